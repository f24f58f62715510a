# From text to figures. The plan (src/saeflow/planning) says which artifacts a configuration needs; the rules only say
# how each is made. Choose with: snakemake --config hydra="experiment=demo dictionary.k=[8,16]"
from snakemake.utils import min_version

min_version("9.0")


include: "workflow/rules/common.smk"
include: "workflow/rules/options.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/stages.smk"
include: "workflow/rules/figures.smk"


rule all:
    default_target: True
    input:
        [
            PLAN.outputs(name, PLAN.stages[name] if stage.target else PLAN.to_make[name])
            for name, stage in stages().items()
        ],
    localrule: True
