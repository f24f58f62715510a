# Every stage that a package of saeflow declares (its stage.py). Where artifacts share jobs there is a rule a job:
# one forward pass fills many columns of activations, one read of them trains many dictionaries.
for STAGE in stages().values():
    for batch in PLAN.batches.get(STAGE.name, ()):

        rule:
            name:
                f"{STAGE.name}_{short_hash(batch)}"
            input:
                PLAN.inputs(STAGE.name, *batch),
            output:
                PLAN.outputs(STAGE.name, batch),
            log:
                f"logs/{STAGE.name}/{short_hash(batch)}.log",
            conda:
                "../../environment.yml"
            threads: PLAN.threads(STAGE.name)
            resources:
                **resources(PLAN, STAGE.name, batch),
            params:
                select=key_options(batch),
                config=PLAN.param(STAGE.name, *batch),
            shell:
                JOB


# Elsewhere every artifact has a job of its own. Figures have a rule that puts them into the report.
for STAGE in stages().values():
    if STAGE.together is None and not STAGE.says_all:

        rule:
            name:
                STAGE.name
            input:
                of_key(partial(PLAN.inputs, STAGE.name)),
            output:
                f"results/{STAGE.name}/{{key}}/provenance.json",
            log:
                f"logs/{STAGE.name}/{{key}}.log",
            conda:
                "../../environment.yml"
            threads: PLAN.threads(STAGE.name)
            resources:
                **resources_of_key(STAGE.name),
            params:
                select=of_key(lambda key: key_options([key])),
                config=of_key(partial(PLAN.param, STAGE.name)),
            shell:
                JOB


# snakemake jacobian_tables, snakemake heads_tables: the numbers of every study of the plan, on the terminal.
for STAGE in stages().values():
    if STAGE.table:

        rule:
            name:
                f"{STAGE.name}_tables"
            input:
                PLAN.outputs(STAGE.name, PLAN.stages[STAGE.name]),
            log:
                f"logs/{STAGE.name}_tables.log",
            localrule: True
            conda:
                "../../environment.yml"
            params:
                tables=lambda wildcards, input: [shlex.quote(f"{os.path.dirname(r)}/table.txt") for r in input],
            shell:
                "cat {params.tables} /dev/null | tee {log:q}"
