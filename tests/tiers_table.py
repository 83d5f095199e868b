"""Write the table of tiers into docs/exchange.md:

python -m tests.tiers_table"""

import argparse
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "exchange.md"
BEGIN, END = "<!-- tiers: written by python -m tests.tiers_table -->\n", "<!-- end of tiers -->\n"


def markdown() -> str:
    """The table of tiers, and that of the tokenizers, of the parts of this toolkit."""
    from toolkit.components import shelf
    from toolkit.exchange import tiers

    cells: dict[str, dict[str, dict[str, list[str]]]] = {}  # by kind, tier, and model types or reason
    for row in tiers.rows(shelf()):
        tier, _, about = row.tier.partition(": ")
        columns = cells.setdefault(row.kind, {"native": {}, "code": {}, "refused": {}})
        columns[tier].setdefault(about, []).append(f"`{row.name}`")
    lines = ["| kind | native | code | refused |", "|---|---|---|---|"]
    lines += [f"| {kind} | {' | '.join(map(_cell, columns.values()))} |" for kind, columns in cells.items()]
    lines += ["", "| tokenizer | file with its ids |", "|---|---|"]
    lines += [f"| `{name}` | {file} |" for name, file in tiers.tokenizers(shelf()).items()]
    return "\n".join(lines) + "\n"


def _cell(groups: dict[str, list[str]]) -> str:
    """The parts of a kind and tier, by what is said of them."""
    shown = [(f"{about}: " if about else "") + ", ".join(names) for about, names in groups.items()]
    return "; ".join(shown) or "none"


def main() -> None:
    """Replace what is between the markers of the page."""
    argparse.ArgumentParser(prog="python -m tests.tiers_table", description=__doc__.split(":")[0]).parse_args()
    from toolkit.compose import load_shelf

    load_shelf()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + markdown() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
