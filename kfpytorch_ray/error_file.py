"""The error file of an attempt, which all pods of a job write to: whose failure does Flyte get to read?

The last one's. But where a rank fails, ranks in other pods lose their connections and fail after it, so that what
stays is a consequence, and a recoverable failure is not tried again. A pod that failed later therefore leaves what is
there. In Flyte's own way every pod has a file, where its installation has enable-distributed-error-aggregation.
"""

from __future__ import annotations

import logging
from datetime import timezone

from flyteidl.core.errors_pb2 import ErrorDocument
from flytekit.bin.entrypoint import get_one_of
from flytekit.core.constants import ERROR_FILE_NAME
from flytekit.core.context_manager import ExecutionParameters, FlyteContextManager

logger = logging.getLogger(__name__)


def told_earlier(context: ExecutionParameters, failed_at: float) -> bool:
    """Whether another pod of this attempt has told Flyte of an earlier failure.

    Args:
        context: Of the task.
        failed_at: When this pod failed, in seconds since the epoch.
    """
    prefix = context.output_metadata_prefix
    # Outside Flyte nothing is written; with its aggregation every pod writes a file of its own.
    if not prefix or get_one_of("FLYTE_INTERNAL_DIST_ERROR_STRATEGY", "_F_DES"):
        return False
    try:
        files = FlyteContextManager.current_context().file_access.get_filesystem_for_path(prefix)
        files.invalidate_cache()
        document = ErrorDocument.FromString(files.cat_file(f"{prefix.rstrip('/')}/{ERROR_FILE_NAME}"))
    except Exception as error:  # noqa: BLE001 - each storage has its own; a failure that cannot be compared is told
        logger.debug("No error file of another pod: %s", error)
        return False
    told = document.error.timestamp.ToDatetime(timezone.utc).timestamp()
    return bool(told < failed_at)
