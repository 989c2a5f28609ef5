"""Finds the units of a model: repeated blocks first, then the leaves that own what is left."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from angelptm.errors import ConfigError

# Modules that read their children's parameters without calling the children, so that a hook on the child never fires.
_INDIVISIBLE = (nn.MultiheadAttention, nn.RNNBase)


@dataclass
class FoundUnit:
    """Parameters that travel together: ``params`` maps each one's first name to its owners."""

    name: str
    params: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """A module at which units are fetched: its hooks fire around its forward.

    ``units`` are the indices of the units that must be on the device then, its own and those of tied parameters.
    ``depth`` is the number of sites around it: a site's units stay while the sites inside it compute.
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

    def visit(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if classes:
                whole = type(child).__name__ in classes
            else:
                whole = _is_block_list(module) or isinstance(child, _INDIVISIBLE)
            if whole:
                blocks.add(full)
            else:
                visit(child, full)

    visit(model, "")
    if classes and not blocks:
        found = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(
            "units.classes", list(classes), "class names of modules in this model", f"It has: {', '.join(found)}."
        )
    return blocks


def find_structure(model: nn.Module, classes: Collection[str] = ()) -> Structure:
    """The units and sites of ``model``.

    Without ``classes``, each child of a ModuleList or Sequential of equal children is a unit (the outermost such list
    counts), and every other module that owns parameters directly is one. With ``classes``, each outermost module of
    such a class is a unit instead. A tied parameter belongs to the unit of its first owner. Raises ConfigError when no
    module has one of ``classes``, or the model has no parameters.
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
        members = list(module.named_modules(prefix=name)) if whole else [(name, module)]
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
                visit(child, f"{name}.{child_name}" if name else child_name, depth + bool(used))

    visit(model, "", 0)
    if not units:
        raise ConfigError("model", type(model).__name__, "a module with parameters")
    return Structure(units, sites)
