"""Finds the units of a model: repeated blocks first, then the leaves that own what is left."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from angelptm.errors import ConfigError

# Modules that read their children's parameters without calling the children, so that a hook on the child never fires.
# The encoder layer's fast path in inference is such a reader.
_INDIVISIBLE = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer)
# Modules that only hold parameters: never called, so their parameters belong to the module around them.
_HOLDERS = (nn.ParameterList, nn.ParameterDict)


@dataclass
class FoundUnit:
    """Parameters that travel together: ``params`` maps each one's first name to its owners."""

    name: str
    params: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """A module at which units are fetched: its hooks fire around its forward.

    ``units`` are the indices of the units that must be on the device then, its own and those of tied parameters.
    ``depth`` is the number of sites around it: a site's units stay while the sites inside it compute. A module that is
    registered under several names is a site under each of them.
    """

    module_name: str
    units: tuple[int, ...]
    depth: int


@dataclass
class Structure:
    """Units in order of registration, and sites in the order in which a forward pass is expected to enter them."""

    units: list[FoundUnit]
    sites: list[Site]


def _is_block_list(module: nn.Module) -> bool:
    """A container whose children are repeated blocks: all of one class, each with parameters below its own level."""
    children = list(module.children())
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and bool(children)
        and len({type(child) for child in children}) == 1
        and all(any(True for _ in child.parameters()) for child in children)
    )


def _find_blocks(model: nn.Module, classes: Collection[str]) -> set[str]:
    """Names of the outermost modules that are a unit as a whole."""
    blocks: set[str] = set()
    chosen = False

    def visit(module: nn.Module, name: str, in_list: bool) -> None:
        nonlocal chosen
        named = type(module).__name__ in classes
        chosen = chosen or named
        if named or in_list or isinstance(module, _INDIVISIBLE):
            blocks.add(name)
            return
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            visit(child, full, not classes and _is_block_list(module))

    visit(model, "", False)
    if classes and not chosen:
        found = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(
            "units.classes", list(classes), "class names of modules in this model", f"It has: {', '.join(found)}."
        )
    return blocks


def _holders_in(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Lists and dicts of parameters directly in a module, and in each other."""
    found: list[tuple[str, nn.Module]] = []
    for child_name, child in module.named_children():
        if isinstance(child, _HOLDERS):
            found += child.named_modules(prefix=f"{name}.{child_name}" if name else child_name)
    return found


def find_structure(model: nn.Module, classes: Collection[str] = ()) -> Structure:
    """The units and sites of ``model``.

    Without ``classes``, each child of a ModuleList or Sequential of equal children is a unit (the outermost such list
    counts), and every other module that owns parameters directly is one, with those of its ParameterLists. With
    ``classes``, each outermost module of such a class is a unit instead. Either way a module that reads its children's
    parameters itself is not divided. A tied parameter belongs to the unit of its first owner. Raises ConfigError when
    no module has one of ``classes``, or the model has no parameters.
    """
    blocks = _find_blocks(model, classes)
    units: list[FoundUnit] = []
    unit_of_param: dict[int, tuple[int, str]] = {}  # id → (unit index, first name)
    sites: list[Site] = []

    def own(unit: FoundUnit, index: int, module_name: str, module: nn.Module) -> list[int]:
        """Enters the module's direct parameters; returns the units they are in."""
        used = []
        for attribute, param in module._parameters.items():
            if param is None:
                continue
            first = f"{module_name}.{attribute}" if module_name else attribute
            if id(param) not in unit_of_param:
                unit_of_param[id(param)] = (index, first)
                unit.params[first] = []
            owner_index, first = unit_of_param[id(param)]
            (unit if owner_index == index else units[owner_index]).params[first].append((module_name, attribute))
            used.append(owner_index)
        return used

    def visit(module: nn.Module, name: str, depth: int) -> None:
        whole = name in blocks
        members = list(module.named_modules(prefix=name)) if whole else [(name, module), *_holders_in(module, name)]
        unit = FoundUnit(name or type(module).__name__)
        used: list[int] = []
        for member_name, member in members:
            used += own(unit, len(units), member_name, member)
        if unit.params:
            units.append(unit)
        if used:
            sites.append(Site(name, tuple(dict.fromkeys(used)), depth))
        if not whole:
            for child_name, child in module.named_children():
                if not isinstance(child, _HOLDERS):
                    visit(child, f"{name}.{child_name}" if name else child_name, depth + bool(used))

    visit(model, "", 0)
    if not units:
        raise ConfigError("model", type(model).__name__, "a module with parameters")
    return Structure(units, sites)
