"""The report's templates. The engine escapes every value that goes into a page; nothing is escaped by hand."""

from __future__ import annotations

import jinja2

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("oncelm.eval", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,  # a name that is not there is an error, not an empty text
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False}


def source(name: str) -> str:
    """A file of the templates as it is."""
    assert ENVIRONMENT.loader is not None
    return ENVIRONMENT.loader.get_source(ENVIRONMENT, name)[0]
