"""The public names of the package: imported on first use, visible to tools, documented."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import alexnet_jax

pytestmark = pytest.mark.both_lines

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(alexnet_jax.__all__)


def test_they_are_those_of_the_design():
    assert set(NAMES) == {
        *("open_run", "Run", "AlexNetSmall", "AlexNet", "local_response_norm", "max_pool", "pca_noise"),
        *("load_weights", "__version__"),
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", alexnet_jax.__version__)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_each_is_there_and_is_what_its_module_defines(name):
    value = getattr(alexnet_jax, name)
    assert value.__name__ == name
    assert value is getattr(sys.modules[value.__module__], name)
    assert value.__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'openrun'"):
        _ = alexnet_jax.openrun


def test_tools_see_them():
    assert set(NAMES) <= set(dir(alexnet_jax))
    tree = ast.parse((ROOT / "alexnet_jax" / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: part.module for part in block.body for alias in part.names}
    assert {"__version__", *imported} == set(NAMES)
    del imported["pca_noise"]
    for name, module in imported.items():
        assert getattr(alexnet_jax, name) is getattr(importlib.import_module(module), name)


def test_the_page_documents_exactly_these():
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    documented = re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.MULTILINE)
    assert sorted(documented) == [f"alexnet_jax.{name}" for name in NAMES if name != "__version__"]
    assert "`alexnet_jax.__version__`" in page


def test_importing_the_package_does_not_import_jax():
    code = "import sys, alexnet_jax; dir(alexnet_jax); print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
