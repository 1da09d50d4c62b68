"""The form of what a conversion is going to make, so that a format that cannot say it is refused before it is made."""

from torch import nn

from ..job import Job
from ..plan import Plan, added_biases
from .form import Form, LinearForm, as_engines_hold


def form_of_plan(job: Job, plan: Plan) -> Form:
    """What a plan comes to, with K and V as engines hold them."""
    source = job.source
    modules = {name: module for name, module in source.model.named_modules() if isinstance(module, nn.Linear)}
    linears = {}
    for name in plan.linears:
        module = modules[name]
        rows, groups = plan.scales_of(name, module.out_features, module.in_features)
        linears[name] = LinearForm(
            plan.label_of(name),
            module.out_features,
            module.in_features,
            module.in_features // groups if groups > 1 else 0,
            plan.scheme_of(name).symmetric,
            rows == 1 < module.out_features,
            module.bias is not None,
        )
    return Form(
        architecture=job.architecture,
        config=source.config,
        scheme=as_engines_hold(plan.scheme.counted(source.config.num_hidden_layers)),
        linears=linears,
        float_linears=tuple(name for name in modules if name not in linears),
        has_coded_embedding=plan.quantizes_embeddings,
        added_biases=tuple(added_biases(source, plan)),
        folds=False,
        dtype=plan.dtype,
        calibrates=True,
    )
