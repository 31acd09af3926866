"""A small language for workflows: nodes in groups, laid out from left to right, written in ComfyUI's two formats.

``Flow(name, info)`` makes one workflow; ``info`` is a server's /object_info, which says each node's
inputs, widgets and outputs. ``flow.ui()`` is what the page opens, ``flow.api()`` what /prompt takes.
"""

from __future__ import annotations

import uuid

TITLE, GAP, PAD, GROUP_TITLE = 30, 24, 20, 44   # pixels: a node's title bar, between nodes, in groups
SLOT, WIDGET, MULTILINE = 20, 24, 90
SOCKET = 14  # from a node's upper edge to its first socket
FOOT = 30  # newer pages write a pack's name and a button for advanced inputs under its nodes
AIR = 260  # a preview grows a sampler by so much while it runs
SAMPLERS = ("KSampler", "SamplerCustomAdvanced", "GMFlowKSampler", "GMFlowSamplerCustom")
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def is_widget(spec: list) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGET_TYPES


def fields(spec: list) -> dict:
    return spec[1] if len(spec) > 1 else {}


def options(spec: list) -> list | None:
    """A combo's values, in the older or the newer notation; None for other inputs."""
    return spec[0] if isinstance(spec[0], list) else fields(spec).get("options") if spec[0] == "COMBO" else None


def inputs_of(info: dict) -> dict[str, tuple[list, bool]]:
    """A node class's inputs in the page's order: name to (spec, optional)."""
    return {
        name: (info["input"][section][name], section == "optional")
        for section in ("required", "optional") for name in info["input_order"].get(section, [])
    }


class Output:
    """A node's output, to be given to another node's input."""

    def __init__(self, node: Node, slot: int):
        self.node, self.slot = node, slot
        self.type = node.info["output"][slot]

    @property
    def height(self) -> int:
        """Where links from it begin."""
        return self.node.pos[1] + SOCKET + SLOT * self.slot


class Node:
    def __init__(self, number: int, class_type: str, info: dict, title, size, show_advanced, models, values: dict):
        self.number, self.class_type, self.info, self.title = number, class_type, info, title or info["display_name"]
        self.show_advanced, self.models = show_advanced, models
        self.ours = class_type.startswith(("GMFlow", "SamplerGMFlow"))
        specs = inputs_of(info)
        if unknown := values.keys() - specs.keys():
            raise KeyError(f"{class_type} has no input {', '.join(sorted(unknown))}")
        self.sockets, self.widgets = {}, {}       # name -> Output | None, name -> value; in the page's order
        for name, (spec, optional) in specs.items():
            if is_widget(spec):
                default = fields(spec).get("default")
                if default is None and name not in values:
                    raise KeyError(f"{class_type}.{name} needs a value")
                self.widgets[name] = values.get(name, default)
            elif name in values or optional:
                self.sockets[name] = values.get(name)
            else:
                raise KeyError(f"{class_type}.{name} needs a link")
        self.specs = {name: spec for name, (spec, _) in specs.items()}
        self.optional = {name for name, (_, optional) in specs.items() if optional}
        self.pos, self.size = (0, 0), size or (280, self.height())
        self.air = AIR if class_type in SAMPLERS else 0

    def __getitem__(self, name: str) -> Output:
        return Output(self, self.info["output_name"].index(name))

    def socket(self, name: str) -> int:
        """The height at which the link into this input ends."""
        return self.pos[1] + SOCKET + SLOT * list(self.sockets).index(name)

    @property
    def bottom(self) -> int:
        """The lower edge, with the air that a preview may take."""
        return self.pos[1] + self.size[1] + self.air

    @property
    def out(self) -> Output:
        return Output(self, 0)

    def height(self) -> int:
        height = 14 + FOOT * self.ours + SLOT * max(len(self.sockets), len(self.info["output"]))
        for name in self.widgets:
            hints = fields(self.specs[name])
            height += MULTILINE if hints.get("multiline") else WIDGET
            height += WIDGET if hints.get("control_after_generate") or name in ("seed", "noise_seed") else 0
        return height

    def widgets_values(self) -> list:
        """Values in the page's order; a seed is followed by what becomes of it after a run."""
        values = []
        for name, value in self.widgets.items():
            values.append(value)
            if fields(self.specs[name]).get("control_after_generate"):
                values.append("fixed")
        return values


class Group:
    """A titled box whose nodes stand under, or with ``across`` beside, each other; ``under`` starts no new column."""

    def __init__(self, title: str, pos, across: bool, color: str):
        self.title, self.pos, self.across, self.color, self.members = title, pos, across, color, []

    def place(self, node, under: bool, drop: int) -> None:
        x, y = self.pos[0] + PAD, self.pos[1] + GROUP_TITLE + TITLE
        if self.members and (under or not self.across):
            x, y = self.members[-1].pos[0], self.members[-1].bottom + GAP + TITLE
        elif self.members:
            x = self.right - PAD + 2 * GAP
        node.pos = (x, y + drop)
        self.members.append(node)

    @property
    def right(self) -> int:
        return max(n.pos[0] + n.size[0] for n in self.members) + PAD

    @property
    def bottom(self) -> int:
        return max(n.bottom for n in self.members) + PAD


class Note:
    """Markdown beside the graph; not part of any prompt."""

    def __init__(self, number: int, text: str, pos, size):
        self.number, self.text, self.pos, self.size = number, text.strip() + "\n", pos, size


class Flow:
    def __init__(self, name: str, info: dict, packs: dict[str, dict]):
        """``packs``: for the pack's own nodes (key "") and for the core's ("core") the properties that name it."""
        self.name, self.info, self.packs = name, info, packs
        self.nodes: list[Node] = []
        self.notes: list[Note] = []
        self.groups: list[Group] = []
        self.routes: dict[tuple[Node, str], tuple] = {}

    def _number(self) -> int:
        return len(self.nodes) + len(self.notes) + 1

    def note(self, text: str, size=(340, 480), pos=(0, 0)) -> Note:
        self.notes.append(Note(self._number(), text, (pos[0], pos[1] + TITLE), size))
        return self.notes[-1]

    def group(self, title: str, pos=None, right_of: Group | None = None, below: Group | None = None, gap=40,
              across=False, color="#3f789e") -> Group:
        """A new group; ``right_of`` and ``below`` give the side of a finished one, ``pos`` what they leave open."""
        x, y = pos or (None, None)
        if right_of is not None:
            x, y = right_of.right + gap, right_of.pos[1] if y is None else y
        if below is not None:
            x, y = below.pos[0] if x is None else x, below.bottom + gap
        self.groups.append(Group(title, (x, y), across, color))
        return self.groups[-1]

    def add(self, class_type: str, title: str | None = None, size=None, under=False, show_advanced=False, models=None,
            drop=0, **values) -> Node:
        """A node in the newest group, lower by ``drop`` so that links pass above it. ``models``: files to offer for
        download if the server lacks them."""
        node = Node(self._number(), class_type, self.info[class_type], title, size, show_advanced, models, values)
        self.nodes.append(node)
        self.groups[-1].place(node, under, drop)
        return node

    def route(self, node: Node, name: str, *points: tuple[int, int]) -> None:
        """Lead the link into this input over these points. Links of one output share those that they begin with."""
        self.routes[node, name] = points

    def trunk(self, x: int, *ends: tuple[Node, str]) -> None:
        """Lead the links of one output, which end in these inputs, along an upright line at ``x``."""
        for node, name in ends:
            start, end = node.sockets[name].height, node.socket(name)
            stops = {n.socket(i) for n, i in ends} | {end}
            between = [y for y in stops if start < y <= end or end <= y < start]
            self.route(node, name, (x, start), *((x, y) for y in sorted(between, reverse=end < start)))

    def links(self) -> list[list]:
        """[id, from, slot, to, slot, type] of every link."""
        found = [(source, node, slot) for node in self.nodes
                 for slot, source in enumerate(node.sockets.values()) if source]
        return [
            [number, source.node.number, source.slot, node.number, slot, source.type]
            for number, (source, node, slot) in enumerate(found, 1)
        ]

    def around(self, node: Node, name: str) -> None:
        """Lead a link down its column around the nodes between: right, under its own node, and left."""
        source = node.sockets[name]
        above, x = source.node, source.node.pos[0]
        right, left, under = x + above.size[0] + PAD // 2, x - PAD // 2, above.bottom + GAP // 2
        self.route(node, name, (right, source.height), (right, under), (left, under), (left, node.socket(name)))

    def reroutes(self, links: list[list]) -> dict:
        """The page's reroutes: each knows the one before it and its links; each link knows its last one."""
        found, extensions = {}, []
        inputs = [(node, name) for node in self.nodes for name, source in node.sockets.items() if source]
        for (number, *origin, _, _, _), key in zip(links, inputs, strict=True):
            points, parent = self.routes.get(key, ()), None
            for count in range(1, len(points) + 1):
                way = (*origin, points[:count])
                before = {} if parent is None else {"parentId": parent}
                stop = found.setdefault(way, {"id": len(found) + 1, **before, "pos": points[count - 1], "linkIds": []})
                stop["linkIds"].append(number)
                parent = stop["id"]
            if parent is not None:
                extensions.append({"id": number, "parentId": parent})
        return {"reroutes": list(found.values()), "linkExtensions": extensions} if found else {}

    def api(self) -> dict:
        prompt = {}
        for node in self.nodes:
            sources = {name: [str(s.node.number), s.slot] for name, s in node.sockets.items() if s is not None}
            prompt[str(node.number)] = {
                "class_type": node.class_type, "inputs": {**node.widgets, **sources}, "_meta": {"title": node.title},
            }
        return prompt

    def ui(self) -> dict:
        links = self.links()
        nodes = [self._note(note, order) for order, note in enumerate(self.notes)]
        nodes += [self._node(node, order, links) for order, node in enumerate(self.nodes, len(self.notes))]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"gmflow-nodes/workflows/{self.name}")), "revision": 0,
            "last_node_id": self._number() - 1, "last_link_id": len(links), "nodes": nodes, "links": links,
            "groups": [
                {
                    "id": number, "title": group.title, "color": group.color, "font_size": 24, "flags": {},
                    "bounding": [*group.pos, group.right - group.pos[0], group.bottom - group.pos[1]],
                }
                for number, group in enumerate(self.groups, 1)
            ],
            "config": {}, "extra": self.reroutes(links), "version": 0.4,
        }

    def _note(self, note: Note, order: int) -> dict:
        return {
            "id": note.number, "type": "MarkdownNote", "pos": list(note.pos), "size": list(note.size), "flags": {},
            "order": order, "mode": 0, "inputs": [], "outputs": [], "title": "Note", "properties": {},
            "widgets_values": [note.text], "color": "#432", "bgcolor": "#653",
        }

    def _node(self, node: Node, order: int, links: list[list]) -> dict:
        into = {link[4]: link[0] for link in links if link[3] == node.number}
        inputs = [
            {"name": name, "type": node.specs[name][0], **({"shape": 7} if name in node.optional else {}),
             "link": into.get(slot)}
            for slot, name in enumerate(node.sockets)
        ]
        inputs += [
            {"name": name, "type": "COMBO" if options(node.specs[name]) else node.specs[name][0],
             "widget": {"name": name}, "link": None}
            for name in node.widgets
        ]
        outputs = [
            {"name": name, "type": kind, "links": [n for n, a, s, *_ in links if (a, s) == (node.number, slot)] or None}
            for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True))
        ]
        properties = {**self.packs["" if node.ours else "core"], "Node name for S&R": node.class_type}
        if node.models:
            properties["models"] = node.models
        return {
            "id": node.number, "type": node.class_type, "pos": list(node.pos), "size": list(node.size), "flags": {},
            "order": order, "mode": 0, "inputs": inputs, "outputs": outputs,
            **({"title": node.title} if node.title != node.info["display_name"] else {}),
            **({"showAdvanced": True} if node.show_advanced else {}),
            "properties": properties, "widgets_values": node.widgets_values(),
        }
