"""Pages of HTML from the templates beside this file: whatever is put into them is escaped."""

from __future__ import annotations

from pathlib import Path

import jinja2

from .metrics import write_beside


def write_html(path: Path, template: str, **values: object) -> Path:
    """Writes templates/<template> with its values at once, or leaves the old file; returns path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    write_beside(path, page.encode(errors="backslashreplace"))  # half a surrogate pair, from JSON
    return path
