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


# snakemake jacobian_tables: the table of notebook 000 of every study of the plan, on the terminal.
rule jacobian_tables:
    input:
        PLAN.outputs("jacobian", PLAN.stages["jacobian"]),
    log:
        "logs/jacobian_tables.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        tables=lambda wildcards, input: [shlex.quote(f"{os.path.dirname(r)}/table.txt") for r in input],
    shell:
        "cat {params.tables} /dev/null | tee {log:q}"
