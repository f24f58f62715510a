rule heads:
    input:
        lambda wildcards: PLAN.inputs("heads", wildcards.key),
    output:
        "results/heads/{key}/provenance.json",
    log:
        "logs/heads/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("heads")
    resources:
        **PLAN.resources("heads"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("heads", wildcards.key),
    shell:
        job("heads")
