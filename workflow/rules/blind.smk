rule blind:
    input:
        lambda wildcards: PLAN.inputs("blind", wildcards.key),
    output:
        "results/blind/{key}/provenance.json",
    log:
        "logs/blind/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("blind")
    resources:
        **PLAN.resources("blind"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("blind", wildcards.key),
    shell:
        job("blind")
