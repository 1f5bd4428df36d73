"""Reports: typed rows, and three ways to show them (terminal, JSON, HTML)."""
