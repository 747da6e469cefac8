"""Make docs/report.png: the first screens of a report.

    python tests/report_picture.py [<sweep>/report.html [picture]]

Without a report it is one of twelve made-up runs.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from browser import chromium, opened
from sweep_folders import grid, write_sweep

from specforge_exp.config import ReportConfig
from specforge_exp.stages.report import make

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "report.png"


def picture(html: Path, path: Path) -> None:
    """Save what a screen of 1440 x 2130 pixels shows."""
    with chromium() as browser, opened(browser, html, height=2130) as page:
        page.wait_for_timeout(300)
        page.screenshot(path=path)


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else PICTURE
    if len(sys.argv) > 1:
        picture(Path(sys.argv[1]), target)
    else:
        with TemporaryDirectory() as folder:
            sweep = write_sweep(Path(folder), grid(bench=("stories", "arithmetic", "code")))
            make(sweep, ReportConfig())
            picture(sweep / "report.html", target)
