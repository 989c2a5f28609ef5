"""Plans can be made where neither torch nor the native module works."""

from __future__ import annotations

import subprocess
import sys

PLAN_WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "angelptm_native", "numpy", "transformers"):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
from angelptm.plan import Budgets, make_plan
from angelptm.units import ParamSpec, pack

layout = pack("unit", 0, [ParamSpec("weight", (64, 64), True, (("", "weight"),))], 16384)
budgets = Budgets(page_bytes=65536, device_bytes=65536, host_bytes=2**20)
plan = make_plan([layout], [((0,), 0)], budgets, param_itemsize=4, grad_itemsize=4, moment_count=2)
print(plan.arena.peak_frames)
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_plan_is_made_without_torch_or_the_native_module() -> None:
    assert run(PLAN_WITHOUT_TORCH) == "1"


def test_public_names_come_from_the_package_on_first_use() -> None:
    names = run("import angelptm; print(' '.join(angelptm.__all__)); [getattr(angelptm, n) for n in angelptm.__all__]")
    assert {"initialize", "materialize", "load_config", "Engine", "CapacityError"} <= set(names.split())


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    out = run("import angelptm, angelptm.units\nfor m in (angelptm, angelptm.units): print(hasattr(m, 'nothing'))")
    assert out.split() == ["False", "False"]
