"""The serving half of rbee: what queen and workers run.

``contract`` holds the words both sides and the CLI share, ``common`` what both servers are built from,
``worker`` and ``queen`` one server each, ``models`` the catalog and downloads of a node.
"""

__version__ = "0.1.0"
