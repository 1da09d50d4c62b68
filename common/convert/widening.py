"""Which linears are in int8 where the others are in int4, for a mean of the bits of a weight."""

from collections.abc import Iterable, Mapping

from ..errors import OctavoError
from ..runtime.checkpoint.files import TensorHeader
from .job import Job
from .measure.costs import Cost
from .output.model import OutputModel
from .output.sizes import bits_per_weight
from .plan import Plan
from .spelling import named


def layer_weights(job: Job, plan: Plan) -> dict[str, int]:
    """How many weights the quantized linears of the layers have, by name."""
    names = (name for name in plan.linears if name != job.source.facts.head)
    return {name: job.source.model.get_submodule(name).weight.numel() for name in names}


def bits_of(headers: Mapping[str, TensorHeader], sizes: Mapping[str, int]) -> dict[str, float]:
    """Bits of each of some modules on the disk, all counted but biases, by name."""
    return {name: size * (bits_per_weight(headers, {name: size}) or 0) for name, size in sizes.items()}


def widened(job: Job, floats: Iterable[str], costs: Iterable[Cost]) -> list[str]:
    """Names of the linears to be in int8: those of the largest costs for the bits that they take, as long as they fit.

    Raises:
        OctavoError: even without any of them, weights take more bits than were asked for.
    """
    most = job.request.mean_bits
    if most is None:
        return []
    narrow = job.plan(floats)
    sizes = layer_weights(job, narrow)
    plans = narrow, job.plan(floats, sizes)
    headers = [OutputModel(job.architecture, job.source, plan).planned() for plan in plans]
    few, many = (bits_of(of_plan, sizes) for of_plan in headers)
    more = {name: many[name] - few[name] for name in sizes}
    left = most * sum(sizes.values()) - sum(few.values())
    if left < 0:
        least = sum(few.values()) / sum(sizes.values())
        raise OctavoError(
            f"{named('mean_bits')} {most:g}: weights of {narrow.linear.label} take {least:.2f}; give more"
        )
    errors = {cost.name: cost.error for cost in costs if cost.name in sizes}
    chosen = []
    for name in sorted(errors, key=lambda name: -errors[name] / more[name]):
        if more[name] <= left:
            chosen.append(name)
            left -= more[name]
    return chosen
