"""The parameter that a module holds while its values are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from angelptm.errors import ParkedError

_HARMLESS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class ParkedParameter(torch.Tensor):
    """Shape, dtype, device and requires_grad of a parameter, without values.

    Everything that asks only for those works: ``named_parameters``, ``numel``, ``model.device``, optimizer groups. Any
    computation raises ParkedError, so an absent parameter is never a wrong read. It counts as an ``nn.Parameter``.
    """

    param_name: str
    _gradient_is_paged: Callable[[], bool]

    @staticmethod
    def __new__(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
        gradient_is_paged: Callable[[], bool],
    ) -> ParkedParameter:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)
        self._is_param = True
        self.param_name = name
        self._gradient_is_paged = gradient_is_paged
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parked = next(arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(arg, cls))
        if func in _HARMLESS:
            return cls(
                parked.param_name,
                tuple(parked.shape),
                parked.dtype,
                parked.device,
                parked.requires_grad,
                parked._gradient_is_paged,
            )
        raise parked._absent(str(func))

    def _absent(self, what: str) -> ParkedError:
        return ParkedError(
            f"parameter {self.param_name}: {what} needs its values, but it is not on the device now. "
            "Use engine.gathered(parameter) to read or change it; inside the model, name the module that uses it "
            "in units.classes so that it is fetched in time."
        )

    # What torch does not dispatch.

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise self._absent("numpy")

    def tolist(self) -> Any:
        raise self._absent("tolist")

    def data_ptr(self) -> int:
        raise self._absent("data_ptr")

    def untyped_storage(self) -> Any:
        raise self._absent("untyped_storage")

    @property
    def data(self) -> torch.Tensor:
        """Parked as well. Assignment raises ParkedError."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:  # noqa: ARG002
        raise self._absent("assignment to data")

    @property
    def grad(self) -> None:
        """None without gradient. Raises ParkedError where there is one, since it lives in pages, not in a tensor."""
        if self._gradient_is_paged():
            raise ParkedError(
                f"parameter {self.param_name}: its gradient lives in pages. Clip with gradient_clipping in the config "
                "or engine.clip_grad_norm_(max_norm); drop gradients with engine.optimizer.zero_grad()."
            )

    @grad.setter
    def grad(self, value: None) -> None:
        if value is not None:
            raise ParkedError(f"parameter {self.param_name}: a gradient cannot be assigned; it lives in pages.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ParkedParameter({self.param_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise ParkedError(
            f"parameter {self.param_name}: its values are in pages, so the model cannot be copied or pickled. "
            "Use engine.state_dict() or engine.export_safetensors(folder)."
        )

    def __deepcopy__(self, _memo: Any) -> Any:
        return self.__reduce_ex__(2)
