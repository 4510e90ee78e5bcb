"""Names under which scripts for other engines start a server."""
