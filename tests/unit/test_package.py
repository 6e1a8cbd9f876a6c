"""The package as a whole: its public names, its layers, its errors."""

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import ray_stateful
from ray_stateful import errors

ROOT = Path(ray_stateful.__file__).parent

# From the top down: a module imports from its own layer and from those below it, never from above.
LAYERS = [
    {"cli", "testing"},
    {"diff", "export", "export_torch", "importing", "listing", "restore_cost", "slabs", "verify"},
    {"checkpointer"},
    {"background", "decisions", "orphans", "preemption"},
    {"checkpoint"},
    {"initial"},
    {"restoring"},
    {"joint_reads", "meters", "outcomes"},
    {"filling"},
    {"reporting"},
    {"candidates", "matching", "parts", "report"},
    {"ray_callbacks", "ray_data"},
    {"ray_shards"},
    {"ray_train", "ray_meters", "plain_metrics", "save_requests"},
    {"ray_scores"},
    {"stateful_wrappers"},
    {"runs", "stopwatch", "wrappers", "states"},
    {"storage"},
    {"format", "ranks"},
    {"errors"},
    {"collector", "printable"},
]


def layer_of(module):
    top = module.removeprefix("ray_stateful").lstrip(".").split(".")[0]
    return next((n for n, layer in enumerate(LAYERS) if top in layer), None)


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        yield ".".join(["ray_stateful", *(part for part in relative.parts if part != "__init__")]), path


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ray_stateful":
                yield from (f"ray_stateful.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_a_layer():
    assert [name for name, _ in modules() if name != "ray_stateful" and layer_of(name) is None] == []


def test_imports_point_down_the_layers_and_never_up():
    upward = [
        f"{name} imports {imported}"
        for name, path in modules()
        if name != "ray_stateful"
        for imported in imports_of(path)
        if imported.startswith("ray_stateful.") and layer_of(imported) < layer_of(name)
    ]
    assert upward == []


def test_only_the_ray_modules_import_ray():
    guilty = {name for name, path in modules() for imported in imports_of(path) if imported.split(".")[0] == "ray"}
    assert guilty <= {
        "ray_stateful.ray_train",
        "ray_stateful.ray_callbacks",
        "ray_stateful.ray_data",
        "ray_stateful.ray_meters",
        "ray_stateful.ray_scores",
        "ray_stateful.ray_shards",
    }


def test_the_public_names_are_these():
    assert ray_stateful.__all__ == [
        "Checkpointer",
        "GlobalBatchSampler",
        "LoaderState",
        "ModelState",
        "OptimizerState",
        "Progress",
        "RandomState",
        "ResizeGuard",
        "ResumeReport",
        "SaveReport",
        "accumulate",
        "restore",
        "save",
    ]
    for name in ray_stateful.__all__:
        assert getattr(ray_stateful, name) is not None


@pytest.mark.parametrize("module", ["ray_stateful", "ray_stateful.format.manifest", "ray_stateful.format.index"])
def test_a_command_line_can_start_without_torch_and_ray(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'ray') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def arguments_for(kind):
    samples = {"str": "s3/x", "int": 3, "float": 1.5, "dict[int, str]": {1: "no"}, "dict[int, int]": {0: 1, 1: 2}}
    samples |= {"dict[str, str]": {"checkpoint": "damaged"}, "tuple[str, ...]": ("a: missing",)}
    parameters = list(inspect.signature(kind).parameters.values())
    return [samples[parameter.annotation] for parameter in parameters]


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name not in ("CheckpointError", "RestoreFailed")])
def test_every_error_survives_pickling_and_says_the_same(name):
    error = getattr(errors, name)(*arguments_for(getattr(errors, name)))
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_tree_in_the_docstring_names_every_error():
    assert [name for name in errors.__all__ if name not in errors.__doc__] == []
    assert importlib.import_module("ray_stateful.errors").__all__ == sorted(errors.__all__)
