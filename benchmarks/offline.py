"""Let the published dashboard work without the internet: ``python benchmarks/offline.py``.

asv's page takes its JavaScript from three hosts, and says that it cannot start where they are not
reached. This lays the same libraries beside it, by npm, and lets the page refer to them.
"""

import re
import subprocess
from pathlib import Path

HTML = Path(__file__).parents[1] / ".asv" / "html"
PACKAGES = ["jquery@3.3.1", "flot@0.8.3", "flot-orderbars@1.0.0", "stupid-table-plugin@1.1.3",
            "blueimp-md5@2.19.0", "bootstrap@3.1.1"]  # fmt: skip
FILES = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}
REMOTE = re.compile(
    r'(src|href)="https://[^"]+/([^"/]+)"( (?:integrity|crossorigin|referrerpolicy)="[^"]*")*'
)


def local(found: re.Match[str]) -> str:
    """Refer to the file that was laid beside the page."""
    attribute, name = found[1], found[2]
    if name not in FILES:
        raise SystemExit(f"offline: asv's page asks for {name}, which is not among FILES")
    return f'{attribute}="node_modules/{FILES[name]}"'


def main() -> None:
    """Fetch the libraries and rewrite the page."""
    page = HTML / "index.html"
    if not page.exists():
        raise SystemExit(f"offline: expected a dashboard in {HTML}: run asv publish first")
    text = REMOTE.sub(local, page.read_text(encoding="utf-8"))
    command = ["npm", "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(HTML)]
    subprocess.run([*command, *PACKAGES], check=True)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
