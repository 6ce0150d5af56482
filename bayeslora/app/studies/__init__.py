"""Studies: tasks, bases, methods, seeds and settings of one file, run as cells of one folder, and their tables."""

from bayeslora.app.studies.study import Study

__all__ = ["Study"]
