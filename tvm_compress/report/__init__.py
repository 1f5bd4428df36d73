"""Reports: typed rows, and three ways to show them (terminal, JSON, HTML)."""

from .assemble import assemble
from .html import write_html
from .rows import Report, report_schema

__all__ = ["Report", "assemble", "report_schema", "write_html"]
