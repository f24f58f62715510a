rule jacobian:
    input:
        lambda wildcards: PLAN.inputs("jacobian", wildcards.key),
    output:
        "results/jacobian/{key}/provenance.json",
    log:
        "logs/jacobian/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("jacobian")
    resources:
        **PLAN.resources("jacobian"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("jacobian", wildcards.key),
    shell:
        job("jacobian")
