"""Graphs: who depends on whom in a program, and who descends from whom among particles."""

from itertools import product
from typing import TYPE_CHECKING, Any

import networkx

from .plots import new_figure
from .program import Program
from .weights import normalise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .posterior import Posterior

STYLES = {  # colour, box style and what the legend says
    "process": ("#c6dbef", "round,pad=0.5", "process (a diffusion or flow prior)"),
    "latent": ("#ffffff", "ellipse,pad=0.3", "latent"),
    "observed": ("#d9d9d9", "ellipse,pad=0.3", "observed"),
    "factor": ("#fdd0a2", "square,pad=0.4", "factor (a reward or constraint)"),
    "deterministic": ("#f7f7f7", "round,pad=0.4", "deterministic"),
}
DASHED = "deterministic"


def dependency_graph(program: Program) -> "networkx.DiGraph[str]":
    """The statements of a program; an edge leads from what is drawn to what depends on it.

    Every node has a ``kind``: process, latent, observed, factor or deterministic. Processes also
    have ``num_steps``, ``event_shape`` and ``members`` (the sites of a Team), observed sites
    ``gaussian``.
    """
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for name, source in program.sources.items():
        process = source.process
        if process is None:
            graph.add_node(name, kind="latent", discrete=source.discrete)
            continue
        facts = {"num_steps": process.num_steps, "event_shape": tuple(process.event_shape)}
        graph.add_node(name, kind="process", members=process.members(name), **facts)
    for name, each in program.likelihoods.items():
        if name not in graph:
            graph.add_node(name, kind=each.kind, gaussian=each.gaussian)
    parents = {name: each.parents for name, each in program.likelihoods.items()}
    parents |= {name: source.parents for name, source in program.sources.items()}
    for name, above in parents.items():
        graph.add_edges_from((parent, name) for parent in sorted(above))
    return graph


def genealogy(posterior: "Posterior") -> "networkx.DiGraph[tuple[int, ...]]":
    """The final particles and their ancestors; an edge leads from parent to child, from t to t - 1.

    Nodes are ``(t, *problem, run, index)``. Each has a ``weight``, its share in its run after step
    t. Particles without living descendants are left out.
    """
    graph: networkx.DiGraph[tuple[int, ...]] = networkx.DiGraph()
    history = posterior.history
    alive = set(product(*(range(size) for size in posterior.particles.axes)))
    for k in reversed(range(len(history))):
        step, weights = history[k], normalise(history[k].log_weights)
        graph.add_nodes_from(((step.t, *at), {"weight": float(weights[at])}) for at in alive)
        if k > 0:
            parents = {at: (*at[:-1], int(step.ancestors[at])) for at in alive}
            before = history[k - 1].t
            graph.add_edges_from(((before, *old), (step.t, *at)) for at, old in parents.items())
            alive = set(parents.values())
    return graph


def plot_graph(program: Program, *, ax: "Axes | None" = None) -> "Figure":
    """The program as a picture, from what is drawn first (top) to what is seen (bottom)."""
    graph = dependency_graph(program)
    places = layers(graph)
    width = 2.3 * max(1, *(len(layer) for layer in places))
    if ax is None:
        ax = new_figure(max(5.8, width), 0.9 + 1.25 * len(places)).subplots()
    boxes = {}
    for depth, layer in enumerate(places):
        for i, name in enumerate(layer):
            x = (i + 0.5) / len(layer)
            boxes[name] = _draw_node(ax, x, -float(depth), name, graph.nodes[name])
    depths = {name: depth for depth, layer in enumerate(places) for name in layer}
    for parent, child in graph.edges:
        ends = {"patchA": boxes[parent].get_bbox_patch(), "patchB": boxes[child].get_bbox_patch()}
        bend = 0.0 if depths[child] - depths[parent] == 1 else 0.12  # around what lies between
        style = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}"}
        arrow = {"color": "0.35", "shrinkA": 2, "shrinkB": 2, **style, **ends}
        ax.annotate(
            "",
            boxes[child].get_position(),
            boxes[parent].get_position(),
            arrowprops=arrow,
            zorder=1,
        )
    ax.set(xlim=(0, 1), ylim=(0.5 - len(places), 0.5))
    ax.set_axis_off()
    _legend(ax, {graph.nodes[name]["kind"] for name in graph})
    seen = sum(graph.nodes[name]["kind"] in ("observed", "factor") for name in graph)
    processes, latents = len(program.processes), len(program.latents)
    ax.set_title(
        f"{_count(processes, 'process', 'processes')} and {_count(latents, 'latent', 'latents')}, "
        f"weighed by {_count(seen, 'site', 'sites')}"
    )
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def layers(graph: "networkx.DiGraph[str]") -> list[list[str]]:
    """What is drawn, by depth, and below it what is made or seen of it, near its parents."""
    drawn = [name for name in graph if graph.nodes[name]["kind"] in ("process", "latent")]
    rows = [*networkx.topological_generations(graph.subgraph(drawn)), set(graph) - set(drawn)]
    found: list[list[str]] = []
    place: dict[str, float] = {}

    def middle(name: str) -> tuple[float, str]:
        above = [place[parent] for parent in graph.predecessors(name)]
        return (sum(above) / len(above) if above else 0.0, name)

    for row in filter(None, rows):
        layer = sorted(row, key=middle) if found else list(row)
        place |= {name: (i + 0.5) / len(layer) for i, name in enumerate(layer)}
        found.append(layer)
    return found


def _draw_node(ax: "Axes", x: float, y: float, name: str, node: dict[str, Any]) -> Any:
    color, style, _ = STYLES[node["kind"]]
    text = name
    if node["kind"] == "process":
        members = ", ".join(node["members"])
        text = members if members == name else f"{name}: {members}"
        text += f"\n{node['event_shape']}, {node['num_steps']} steps"
    line = "--" if node["kind"] == DASHED else "-"
    box = {"boxstyle": style, "facecolor": color, "edgecolor": "0.3", "linestyle": line}
    return ax.text(x, y, text, ha="center", va="center", bbox=box, zorder=2, fontsize="medium")


def _legend(ax: "Axes", kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=color, edgecolor="0.3", label=label, ls="--" if kind == DASHED else "-")
        for kind, (color, _, label) in STYLES.items()
        if kind in kinds
    ]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False,
        fontsize="small",
    )  # fmt: skip


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
