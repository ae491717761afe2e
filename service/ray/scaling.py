"""When Ray Serve starts and stops replicas: by the seconds of work that wait in their queues.

Ray pickles this module by value, so it imports nothing of Vitrail.
"""

import math
from typing import Any

# The name of the statistic that replicas record.
QUEUE_SECONDS = "queue_seconds"
# The queue that a replica is meant to have. A busy replica's queue holds at least the pass that
# will follow the running one, so a target near a pass's duration would never stop adding.
TARGET_S = 0.25


def scale_by_queue(context: Any) -> tuple[int, dict[str, Any]]:
    """As many replicas as keep each queue at TARGET_S: a policy of Ray Serve's autoscaling.

    A deployment without replicas has no queue; requests that wait for one start it.

    Args:
        context: Ray's AutoscalingContext.

    Returns:
        The number of replicas, which Ray keeps within its bounds, and no state.
    """
    if context.current_num_replicas == 0:
        return min(1, math.ceil(context.total_num_requests)), {}
    queues = (context.aggregated_metrics or {}).get(QUEUE_SECONDS, {})
    if not queues:
        return context.current_num_replicas, {}
    replicas = math.ceil(sum(queues.values()) / TARGET_S)
    busy = context.total_num_requests > 0
    return max(replicas, 1 if busy else 0), {}
