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


# snakemake heads_tables: the numbers of every study of heads of the plan, on the terminal.
rule heads_tables:
    input:
        PLAN.outputs("heads", PLAN.stages["heads"]),
    log:
        "logs/heads_tables.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        tables=lambda wildcards, input: [shlex.quote(f"{os.path.dirname(r)}/table.txt") for r in input],
    shell:
        "cat {params.tables} /dev/null | tee {log:q}"
