rule stack:
    input:
        lambda wildcards: PLAN.inputs("stack", wildcards.key),
    output:
        "results/stack/{key}/provenance.json",
    log:
        "logs/stack/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("stack")
    resources:
        **PLAN.resources("stack"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("stack", wildcards.key),
    shell:
        job("stack")
