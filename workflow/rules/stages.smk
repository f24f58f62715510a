# Every stage that a package of saeflow declares (its stage.py), by its name. Where artifacts share jobs (one forward
# pass fills many columns of activations, one read of them trains many dictionaries), a job is known by one of them, whose
# receipt stands for all. Figures have a rule of their own, that puts them into the report.
for STAGE in stages().values():
    if not STAGE.says_all:

        rule:
            name:
                STAGE.name
            input:
                inputs_of(STAGE.name),
                marks_of(STAGE.name),
            output:
                update(f"results/{STAGE.name}/{{key}}/provenance.json"),  # another run may have made it meanwhile
            log:
                f"logs/{STAGE.name}/{{key}}.log",
            conda:
                "../../environment.yml"
            threads: PLAN.threads(STAGE.name)
            resources:
                **resources_of_key(STAGE.name),
            shell:
                JOB


# Parts of jobs that share the work of one (device.parts), each a job of its own that runs ahead of that one.
for STAGE in stages().values():
    if STAGE.name in PLAN.parts:

        rule:
            name:
                f"{STAGE.name}_part"
            input:
                inputs_of(STAGE.name),
            output:
                update(mark(STAGE.name, "{key}", "{part}")),
            log:
                f"logs/{STAGE.name}/{part_name('{key}', '{part}')}.log",
            conda:
                "../../environment.yml"
            threads: PLAN.threads(STAGE.name)
            resources:
                **resources_of_key(STAGE.name),
            shell:
                f"{JOB} --part {{wildcards.part}}"


# snakemake jacobian_tables, heads_tables, train_tables: the numbers of every study, or pair, on the terminal.
for STAGE in stages().values():
    if STAGE.table:
        WITH_TABLE = [key for key, instance in PLAN.stages[STAGE.name].items() if STAGE.table(instance)]

        rule:
            name:
                f"{STAGE.name}_tables"
            input:
                PLAN.outputs(STAGE.name, WITH_TABLE),
            log:
                f"logs/{STAGE.name}_tables.log",
            localrule: True
            conda:
                "../../environment.yml"
            params:
                tables=[shlex.quote(str(PLAN.folder(STAGE.name, key) / "table.txt")) for key in WITH_TABLE],
            shell:
                "for table in {params.tables}; do"
                ' if [ -f "$table" ]; then cat "$table";'
                ' else echo "$(dirname "$table") is of an earlier release, which wrote no table"; fi;'
                " done | tee {log:q}"
