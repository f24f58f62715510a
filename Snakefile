# From text to figures. The plan (src/saeflow/planning/graph.py) says which artifacts a configuration needs; the rules only say
# how each is made. Choose with: snakemake --config hydra="experiment=demo dictionary.k=[8,16]"
from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/groundtruth.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/foreign.smk"
include: "workflow/rules/jacobian.smk"
include: "workflow/rules/baseline.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/stack.smk"
include: "workflow/rules/heads.smk"
include: "workflow/rules/blind.smk"
include: "workflow/rules/recover.smk"
include: "workflow/rules/figures.smk"


rule all:
    default_target: True
    input:
        PLAN.outputs("figures", PLAN.stages["figures"]),
        PLAN.outputs("blind", PLAN.stages["blind"]),
    localrule: True
