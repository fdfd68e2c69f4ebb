"""The documentation and the code agree: tables of flags, commands, links, names of files."""

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
from draw_model import draw_model, draw_stages
from flag_tables import fill_tables, parser_of

from model import LMConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README_LINES = 250
OWN_DATA_LINE = 60  # a newcomer meets the first command on data of their own above it


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(markdown: str) -> str:
    """A page without its code."""
    return re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", markdown, flags=re.MULTILINE | re.DOTALL)


def anchors_of(markdown: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    fenced = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", fenced, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        numbered = (slug, *(f"{slug}-{n}" for n in range(1, 100)))
        found.add(next(name for name in numbered if name not in found))
    return found


def dead_links(markdown: str, page: Path, root: Path) -> list[str]:
    """Targets of links and images, web addresses apart, that lead to no file or no heading."""
    prose = prose_of(markdown)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
    targets += re.findall(r"^\[[^\]]+\]:\s*<?([^\s>]+)", prose, flags=re.MULTILINE)
    targets += re.findall(r"""<(?:img|a|source)\b[^>]*?\b(?:src|href)=["']([^"']+)""", prose)
    dead = []
    for target in targets:
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page.resolve()
        inside = file.is_relative_to(root.resolve()) and (not path or file.exists())
        known = anchors_of(text_of(file) if path else markdown) if inside and anchor else {anchor}
        if not inside or anchor not in known:
            dead.append(target)
    return dead


def commands_of(markdown: str) -> list[list[str]]:
    """The words of every `python SCRIPT …` and `torchrun … SCRIPT …` in a page's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.split("&&")[-1], comments=True) for line in lines]
    found = []
    for command in words:
        script = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
        if command and command[0] in ("python", "torchrun") and script is not None:
            found.append(command[script:])
    return found


def unknown_flags(script: str, words: list[str]) -> list[str]:
    """The flags of a command that no script in it has: one may pass flags on to another."""
    parsers = [parser_of(name) for name in [script, *words] if name.endswith(".py")]
    known = {name for p in parsers for action in p._actions for name in action.option_strings}
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if flag not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert dead_links(text_of(page), page, ROOT) == []


def test_a_dead_link_is_found(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a b.png").touch()
    (folder / "other.md").write_text("# One & two\n\n## 参数（全部）\n\n# One & two\n", "utf-8")
    (tmp_path / "outside.md").touch()
    text = (
        "# Here\n[x](https://example.org/none#x) [x](#here) [x](#gone) [x](mailto:a@example.org)\n"
        "[x](a%20b.png) [x](other.md#one--two-1) [x](other.md#参数全部) [x](other.md#three)\n"
        '![x](lost.png "title") <img width="9" src="gone.png"> [x](../outside.md)\n'
        "`[x](code.md)`\n```\n[x](code.md)\n```\n[ref]: lost.md\n"
    )
    found = dead_links(text, folder / "page.md", folder)
    wrong = ["#gone", "../outside.md", "gone.png", "lost.md", "lost.png", "other.md#three"]
    assert sorted(found) == wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_flags_are_those_of_the_parsers(page):
    """`python scripts/flag_tables.py` writes them."""
    assert text_of(page) == fill_tables(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_typed(page):
    wrong = {}
    for script, *words in commands_of(text_of(page)):
        assert (ROOT / script).is_file(), script
        if unknown := unknown_flags(script, words):
            wrong[script] = unknown
    assert wrong == {}


def test_a_wrong_command_is_found():
    page = "```bash\npython train_pretrain.py --dim 8 \\\n    --dimm 8  # --not_this\n```\n"
    ((script, *words),) = commands_of(page)
    assert unknown_flags(script, words) == ["--dimm"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_modules_that_are_named_exist(page):
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*.py")]
    files += [path.name for path in ROOT.glob("*.py")]
    named = set(re.findall(r"(?<![\w*{}./-])[\w./]*\w\.py\b", text_of(page)))
    assert [
        name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)
    ] == []


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_a_readme_is_read_in_one_sitting(name):
    lines = text_of(ROOT / name).splitlines()
    assert len(lines) <= README_LINES
    first = next(i for i, line in enumerate(lines, 1) if "--data_path my" in line)
    assert first < OWN_DATA_LINE


@pytest.mark.parametrize("name", ["training", "serving"])
def test_both_languages_have_the_same_parts(name):
    """The same headings, code blocks and tables, in number and order of levels."""

    def outline(page: Path) -> list[str]:
        return re.findall(r"^(#+ |```\w*|\|-)", text_of(page), flags=re.MULTILINE)

    folder = ROOT / "docs"
    assert outline(folder / f"{name}.md") == outline(folder / f"{name}_zh.md")


def test_the_pictures_are_what_the_script_draws():
    """`python scripts/draw_model.py` writes them."""
    assert text_of(ROOT / "docs" / "model.svg") == draw_model(LMConfig())
    assert text_of(ROOT / "docs" / "stages.svg") == draw_stages()


def test_the_network_is_drawn_with_the_shapes_of_its_configuration():
    small = LMConfig(dim=96, n_layers=3, n_heads=4, n_kv_heads=1, hidden_dim=200, vocab_size=300)
    shapes = re.findall(r"([\d,]+) × ([\d,]+): ([\d,]+)<", draw_model(small))
    numbers = [[int(number.replace(",", "")) for number in shape] for shape in shapes]
    head = 96 // 4
    block = [(96, 96), (96, 200), (96, 200), (96, head), (96, head), (96, 96), (200, 96)]
    assert sorted((a, b) for a, b, _ in numbers) == sorted([(300, 96), *block])
    assert all(a * b == count for a, b, count in numbers)
    total = 300 * 96 + 3 * (sum(a * b for a, b in block) + 2 * 96) + 96
    assert f"MiniMindLM: {total:,} parameters" in draw_model(small)


def test_the_picture_of_the_stages_names_files_that_exist():
    named = re.findall(r">([\w/]+\.py)<", draw_stages())
    assert len(named) == 9 and all((ROOT / name).is_file() for name in named)
