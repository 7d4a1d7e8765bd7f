"""MediaWiki dumps: cut into parts at pages, and parsed."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import mwxml
from mwxml.element_iterator import ElementIterator
from mwxml.errors import MalformedXML

from configs.corpus_schema import SourceConfig
from sharding.documents import Document, Part, decompressed


def pages(source: SourceConfig, part: Part, raw: BinaryIO) -> Iterator[Document]:
    """Articles (namespace 0) that are not redirects: page id and markup of the last revision in the file."""
    root = ElementIterator.from_file(decompressed(raw, Path(part.source).suffix))
    if root.tag != "mediawiki":
        raise MalformedXML(f"its first element is <{root.tag}>, not <mediawiki>")
    for page in mwxml.Dump.from_element(root).pages:
        # The parser would keep the emptied element of every page it has seen: gigabytes in a full dump.
        del root.element[:-1]
        if page.namespace == 0 and page.redirect is None:
            markup = ""
            for revision in page:
                markup = revision.text or ""
            yield Document(str(page.id), markup)
