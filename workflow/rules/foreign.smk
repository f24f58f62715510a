rule foreign:
    input:
        lambda wildcards: PLAN.inputs("foreign", wildcards.key),
    output:
        "results/foreign/{key}/provenance.json",
    log:
        "logs/foreign/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("foreign")
    resources:
        **PLAN.resources("foreign"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("foreign", wildcards.key),
    shell:
        job("foreign")
