"""Write docs/combinations.md: which tests cover which combination, as the markers of the tests say.

    python pipelines/combinations.py --output docs/combinations.md

`@pytest.mark.combines(...)` on a test names methods (METHODS in dit_accel/bench/combinations.py) and features (BESIDE); the
test covers each of these methods with each of these features. With methods alone, a test counts for the table of models only.
`@pytest.mark.refuses(..., because="...")` is the same for combinations that are refused. Nothing is run: tests are collected.
"""

from pathlib import Path

import tyro

from dit_accel.bench.combinations import write_page

ROOT = Path(__file__).resolve().parents[1]


def main(output: Path) -> None:
    """Collect the marked tests and write the page.

    Args:
        output: Markdown file to write.
    """
    write_page(ROOT, output)
    print(f"{output}: written")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
