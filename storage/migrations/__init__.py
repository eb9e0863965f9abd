"""Alembic's migrations; run them through ``storage.migration`` or ``skipplan db upgrade``."""
