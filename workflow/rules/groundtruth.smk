rule groundtruth:
    output:
        "results/groundtruth/{key}/provenance.json",
    log:
        "logs/groundtruth/{key}.log",
    conda:
        "../../environment.yml"
    threads: PLAN.threads("groundtruth")
    resources:
        **PLAN.resources("groundtruth"),
    params:
        select=lambda wildcards: key_options([wildcards.key]),
        config=lambda wildcards: PLAN.param("groundtruth", wildcards.key),
    shell:
        job("groundtruth")
