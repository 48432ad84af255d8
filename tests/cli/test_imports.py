"""What importing the package costs, each in a process of its own."""

import subprocess
import sys

from matrix import cases

HEAVY = {"timm", "transformers", "accelerate", "datasets", "matplotlib", "rich", "typer", "torch._dynamo"}


def imported_by(code):
    """The heavy modules that are there after some code."""
    code = f"import sys\n{code}\nprint(*({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_importing_evopatch_imports_no_tool():
    assert imported_by("import evopatch; assert 'torch' not in sys.modules") == set()
    assert imported_by("import evopatch; evopatch.apply; assert 'torch' in sys.modules") == set()
    assert "timm" in imported_by("import evopatch, timm"), "such an import would be noticed"


MODULES = ("measure.comparison", "training.finetuning")


def test_names_are_loaded_when_they_are_asked_for():
    assert (
        imported_by("import evopatch; evopatch.autopatch, evopatch.EvoConfig, evopatch.apply, dir(evopatch)") == set()
    )
    assert {"accelerate"} & imported_by("import evopatch; evopatch.finetune; import evopatch.training.loop")


@cases("module", ["measure.profiling", "measure.comparison", "training.finetuning", "patching.apply"], MODULES)
def test_modules_are_modules(module):
    code = (
        f"import evopatch, types\nevopatch.profile, evopatch.benchmark, evopatch.finetune\n"
        f"import evopatch.{module} as found\nassert isinstance(found, types.ModuleType), found\n"
        "assert callable(evopatch.profile) and not isinstance(evopatch.profile, types.ModuleType)"
    )
    imported_by(code)


def test_the_help_of_a_command_needs_no_torch():
    code = (
        "import runpy\nsys.argv = ['evopatch', 'finetune', '--help']\n"
        "try:\n    runpy.run_module('evopatch', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\nelse:\n    raise AssertionError\n"
        "assert 'torch' not in sys.modules"
    )
    assert imported_by(code) == {"rich", "typer"}


def test_no_module_name_occurs_twice():
    from collections import Counter
    from pathlib import Path

    import evopatch

    files = Path(evopatch.__file__).parent.rglob("*.py")
    names = Counter(file.stem for file in files if not file.stem.startswith("__"))
    assert len(names) > 50
    assert [name for name, count in names.items() if count > 1] == []
