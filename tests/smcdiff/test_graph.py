"""Graphs: dependencies of programs, and descent of particles."""

import networkx
import pyro
import pyro.distributions as dist
import torch

from smcdiff.graph import dependency_graph, genealogy, layers, plot_graph
from smcdiff.models import Team
from smcdiff.program import Program

from . import examples as ex


def rich(y):
    level = pyro.sample("level", dist.Normal(torch.tensor(0.0).double(), 1.0))
    noise = pyro.sample("noise", dist.LogNormal(level, 0.1))
    agents = Team({"left": ex.PRIOR, "right": ex.PRIOR})("pair")
    gain = pyro.sample("gain", dist.Normal(agents["left"][..., 0], 1.0))
    scene = pyro.deterministic(
        "scene", agents["left"] + gain[..., None] * agents["right"], event_dim=1
    )
    pyro.sample("y", dist.Normal(scene, noise[..., None]).to_event(1), obs=y)
    pyro.factor("reward", -agents["right"].square().sum(-1))


def program() -> Program:
    return Program(rich, (torch.zeros(3, dtype=torch.float64),))


def test_nodes_say_what_they_are():
    graph = dependency_graph(program())
    kinds = {name: node["kind"] for name, node in graph.nodes.items()}
    assert kinds == {
        "pair": "process",
        "level": "latent",
        "noise": "latent",
        "gain": "latent",
        "scene": "deterministic",
        "y": "observed",
        "reward": "factor",
    }
    pair = graph.nodes["pair"]
    assert (pair["num_steps"], pair["event_shape"]) == (8, (6,))
    assert pair["members"] == ("left", "right")
    assert graph.nodes["y"]["gaussian"]


def test_edges_follow_the_program():
    graph = program().graph
    assert networkx.is_directed_acyclic_graph(graph)
    assert set(graph.edges) == {
        ("level", "noise"),
        ("pair", "gain"),
        ("pair", "scene"),
        ("gain", "scene"),
        ("pair", "y"),
        ("gain", "y"),
        ("noise", "y"),
        ("pair", "reward"),
    }


def test_layers_lead_downstream():
    graph = dependency_graph(program())
    depth = {name: i for i, layer in enumerate(layers(graph)) for name in layer}
    assert len(depth) == len(graph)
    assert all(depth[a] < depth[b] for a, b in graph.edges)


def test_drawing_names_every_node():
    figure = plot_graph(program())
    (ax,) = figure.axes
    texts = " ".join(text.get_text() for text in ax.texts)
    for name in ("pair: left, right", "(6,), 8 steps", "noise", "gain", "scene", "y", "reward"):
        assert name in texts
    assert ax.get_title() == "1 process and 3 latents, weighed by 2 sites"
    assert plot_graph(program(), ax=ax) is figure


def test_genealogy_by_hand():
    graph = genealogy(ex.by_hand())
    first = {(2, 0, 0), (2, 0, 2), (2, 1, 0), (2, 1, 1)}  # the others have no descendants
    then = {(t, run, i) for t in (1, 0) for run in (0, 1) for i in (0, 1, 2)}
    assert set(graph) == first | then
    parents = [(2, 0, 0), (2, 0, 0), (2, 0, 2), (2, 1, 0), (2, 1, 1), (2, 1, 1)]
    children = [(1, run, i) for run in (0, 1) for i in (0, 1, 2)]
    assert {(a, b) for a, b in graph.edges if a[0] == 2} == set(zip(parents, children, strict=True))
    assert {(a, b) for a, b in graph.edges if a[0] == 1} == {(a, (0, *a[1:])) for a in children}
    weights = [graph.nodes[0, 0, i]["weight"] for i in (0, 1, 2)]
    torch.testing.assert_close(torch.tensor(weights), torch.tensor([0.25, 0.5, 0.25]))


def test_genealogy_agrees_with_the_roots():
    posterior = ex.bootstrap(num_particles=32, num_runs=2, ess_threshold=1.0, model=ex.noisy)
    graph = posterior.genealogy()
    for run in (0, 1):
        for i in range(32):
            (root,) = (
                node
                for node in networkx.ancestors(graph, (0, run, i))
                if node[0] == posterior.history[0].t
            )
            assert root[-1] == int(posterior.particles.roots[run, i])


def test_genealogy_of_problems_has_their_index():
    graph = ex.for_problems().genealogy()
    assert {len(node) for node in graph} == {4}
    assert {node[1] for node in graph} == {0, 1, 2}
