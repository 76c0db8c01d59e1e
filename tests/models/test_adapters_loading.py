"""Models in folders, and weights in files: read safely, or refused with the reason."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smcdiff.models.adapters import decoder_from_diffusers, from_diffusers, read_checkpoint
from smcdiff.models.adapters.packages import require

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Harmful:
    """What a pickle may do to whoever reads it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


# --------------------------------------------------------------------------------------- one file


def test_weights_come_back(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    torch.save(module.state_dict(), tmp_path / "one.pt")
    torch.save({"step": 3, "ema": module.state_dict()}, tmp_path / "more.pt")
    save_file(module.state_dict(), tmp_path / "one.safetensors")
    for found in (
        read_checkpoint(tmp_path / "one.pt"),
        read_checkpoint(tmp_path / "more.pt", "ema"),
        read_checkpoint(tmp_path / "one.safetensors"),
    ):
        nn.Linear(2, 3).load_state_dict(found)
        assert torch.equal(found["weight"], module.weight)


@pytest.mark.parametrize("kind", ["module", "harm", "pickle"])
def test_python_objects_are_refused_and_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.bin"
    match kind:
        case "module":
            torch.save(nn.Linear(2, 3), path)
        case "harm":
            torch.save({"weight": Harmful()}, path)
        case "pickle":
            path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="more than tensors.*state_dict"):
        read_checkpoint(path)
    assert not (tmp_path / "harm").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no")
    torch.save({"ema": {"a": torch.ones(1)}, "step": 3}, tmp_path / "more.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(tmp_path / "text.pt")
    with pytest.raises(ValueError, match="not in the format of safetensors"):
        read_checkpoint(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="got entries 'ema', 'step'.*say where"):
        read_checkpoint(tmp_path / "more.pt")
    with pytest.raises(ValueError, match="has no 'model', but entries 'ema', 'step'"):
        read_checkpoint(tmp_path / "more.pt", "model")
    with pytest.raises(ValueError, match="got a Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")


# ----------------------------------------------------------------------------------- the packages


def test_libraries_are_imported_only_when_used() -> None:
    program = (
        "import sys, smcdiff.models, smcdiff.models.adapters;"
        "print({'diffusers', 'azula', 'huggingface_hub'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


def test_missing_library_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(ImportError, match="no_such_library is needed.*pip install it"):
        require("no_such_library", "pip install it")


# ---------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip(
        "diffusers", reason="needs diffusers: pip install 'smcdiff[diffusers]'"
    )


@pytest.fixture(scope="module")
def network(diffusers: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def same(process: Any, network: Any) -> bool:
    x = torch.randn(2, 1, 4, 4)
    expected = network(x, process.base.times[2])[0]
    return torch.equal(process.evaluate(x, 2)["output"], expected)


def test_pipeline_and_its_folder_are_one_prior(
    diffusers: Any, network: Any, tmp_path: Path
) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    pipeline = diffusers.DDPMPipeline(network, scheduler)
    pipeline.save_pretrained(tmp_path)
    assert same(from_diffusers(pipeline, num_steps=5), network)
    loaded = from_diffusers(tmp_path, num_steps=5)
    assert same(loaded, network)
    assert loaded.steps == from_diffusers(pipeline, num_steps=5).steps
    swapped = from_diffusers(str(tmp_path), diffusers.DDIMScheduler(), 5)
    assert swapped.deterministic
    assert not loaded.deterministic


def test_weights_of_torch_are_read_without_running_them(
    diffusers: Any, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers.DDPMScheduler()
    network.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert same(from_diffusers(tmp_path, scheduler, 5), network)
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_in.weight": Harmful()}, next(tmp_path.glob("*.bin")))
    with pytest.raises(ValueError, match="more than tensors"):
        from_diffusers(tmp_path, scheduler, 5)
    assert not (tmp_path / "harm").exists()


def test_folders_without_a_model_are_refused(diffusers: Any, network: Any, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler()
    with pytest.raises(FileNotFoundError, match="no config.json and no folder unet"):
        from_diffusers(tmp_path, scheduler)
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded here"):
        from_diffusers("nobody/nothing", scheduler)
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded here"):
        from_diffusers(tmp_path / "not" / "there", scheduler)
    with pytest.raises(FileNotFoundError, match="no scheduler_config.json"):
        from_diffusers(network, tmp_path)
    (tmp_path / "empty").mkdir()
    network.save_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="needs weights in safetensors"):
        from_diffusers(tmp_path, scheduler)
    with pytest.raises(FileNotFoundError, match="no folder vae"):
        decoder_from_diffusers(tmp_path / "empty")


@pytest.mark.parametrize("name", ["DDPMScheduler", "no class", "logging"])
def test_classes_of_other_kinds_are_refused(name: str, diffusers: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"_class_name": "{name}"}}')
    with pytest.raises(ValueError, match=f"'{name}' is no ModelMixin"):
        from_diffusers(tmp_path, diffusers.DDPMScheduler())
