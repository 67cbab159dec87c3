"""The rules that keep the package small: imports point down, files stay short, public names are a list."""

import ast
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import icons

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "icons"
FILES = sorted(PACKAGE.rglob("*.py"))
EDGE = {"lightning", "transformers", "peft", "torchmetrics"}
LAYERS = [
    {
        "agreement",
        "batch",
        "choices",
        "folder_lock",
        "interruption",
        "manifest",
        "output",
        "partition",
        "process",
        "terminal",
    },
    {"gradients", "kronecker", "preconditioner", "projection", "scores"},
    {"store"},
    {"consensus"},
    {"models"},
    {"datamodules"},
    {"modules"},
    {"validation"},
    {"report"},
    {"demo"},
    {"cli"},
]
LONGEST = 350


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(name: str) -> int:
    return next((level for level, names in enumerate(LAYERS) if name in names), -1)


def imports(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "icons" else [node.module]
            )
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = name_of(file)
    if own in ("__init__", "__main__"):
        return
    assert layer_of(own) >= 0, f"{own} stands in no layer: add it to LAYERS and to docs/why.md"
    for imported in imports(file):
        top, *rest = imported.split(".")
        if top == "icons" and rest:
            target = rest[0]
            assert layer_of(target) <= layer_of(own), f"{own} imports {target}, which is above it"
        if top in EDGE:
            assert layer_of(own) >= layer_of("models"), f"{own} imports {top}: only models/ and what is above may"
        if top == "zarr":
            assert own == "store", f"{file.name} names zarr: only store may"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_is_one_noun(file: Path) -> None:
    assert file.stem not in ("utils", "util", "helpers", "helper", "common", "misc")
    assert len(file.read_text().splitlines()) <= LONGEST
    if file.stem != "__init__" or file.read_text().strip():
        assert ast.get_docstring(ast.parse(file.read_text())), "a file says what it is"


def test_every_function_is_typed() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.returns is not None, f"{file.name}: {node.name} has no return type"


def names_from_icons(tree: ast.Module) -> dict[str, str]:
    """Name in a file -> the module of icons that it is, or the name that was taken from one."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("icons")
        for alias in node.names
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_what_begins_with_an_underscore_is_used_in_its_own_file_alone(file: Path) -> None:
    tree = ast.parse(file.read_text())
    taken = names_from_icons(tree)
    private = [whole for whole in taken.values() if whole.rpartition(".")[2].startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.startswith("_"):
            module = taken.get(node.value.id, "")
            if (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py").is_file():
                private.append(f"{module}.{node.attr}")
    assert not private, f"{file.name} takes what another module does not offer: {', '.join(private)}"


def defined_by(node: ast.stmt) -> list[str]:
    """The function, or the constants, that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [name for name in names if name.isupper()]


def test_a_function_or_constant_of_its_own_file_alone_begins_with_an_underscore() -> None:
    users = Counter(
        word
        for folder in (PACKAGE, ROOT / "scripts", ROOT / "tests", ROOT / "docs")
        for file in folder.rglob("*.*")
        if file.suffix in (".py", ".md")
        for word in set(re.findall(r"\w+", file.read_text()))
    )
    offered = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in FILES
        for node in ast.parse(file.read_text()).body
        for name in defined_by(node)
        if not name.startswith("_") and users[name] == 1
    ]
    assert not offered, f"begin with an underscore what its own file alone uses: {', '.join(offered)}"


def test_public_names() -> None:
    assert set(icons.__all__) == {
        "AdamPreconditioner", "ConsensusVotes", "ConversationDataModule", "CountSketch", "Gaussian",
        "GradientExtractor", "GradientStore", "GradientWriter", "Identity", "KroneckerPreconditioner", "Rademacher",
        "RelativePerformance", "ScoreStore", "Selection", "TaskOverlap", "WarmupModule", "exact_influence", "influence",
        "load_adam_state", "load_factors", "per_sample_gradients", "projected_gradients", "select",
    }  # fmt: skip
    assert all(hasattr(icons, name) for name in icons.__all__)


def test_importing_icons_is_light() -> None:
    heavy = ("torch", "numpy", "lightning", "transformers", "peft", "zarr")
    code = f"import icons, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_influence_is_the_function_whoever_imports_its_package_first() -> None:
    code = "import icons.scores.scorer, icons; from icons import influence; print(callable(influence))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_no_file_names_a_machine() -> None:
    path = re.compile(r"/(work|farm|home|root)/[a-z]")
    for file in [
        *FILES,
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(path for path in (ROOT / "scripts").rglob("*.*") if path.suffix not in (".pyc", ".png")),
        *(ROOT / "tests").rglob("*.py"),
    ]:
        assert not path.search(file.read_text()), file


def test_no_name_is_undefined() -> None:
    """Ruff's F821 is off, since jaxtyping's shapes look like names; here it counts wherever no text is."""
    command = [Path(sys.executable).with_name("ruff"), "check", "--isolated", "--select", "F821", "--target-version"]
    run = subprocess.run([*command, "py311", "--output-format", "json", PACKAGE], capture_output=True, text=True)
    for found in json.loads(run.stdout):
        place = (found["location"]["row"], found["location"]["column"] - 1)
        with Path(found["filename"]).open("rb") as file:
            texts = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.STRING]
        assert any(text.start <= place < text.end for text in texts), f"{found['filename']}: {found['message']}"
