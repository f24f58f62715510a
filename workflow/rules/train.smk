rule train:
    input:
        lambda wildcards: PLAN.inputs("train", wildcards.key),
    output:
        "results/train/{key}/provenance.json",
    log:
        "logs/train/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("train")
    resources:
        **PLAN.resources("train"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("train", wildcards.key),
    shell:
        job("train")
