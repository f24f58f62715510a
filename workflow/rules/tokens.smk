rule tokens:
    output:
        "results/tokens/{key}/provenance.json",
    log:
        "logs/tokens/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("tokens")
    resources:
        **PLAN.resources("tokens"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("tokens", wildcards.key),
    shell:
        job("tokens")
