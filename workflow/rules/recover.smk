# A job compares several dictionaries of one model with the truth on the same rows.
for batch in PLAN.batches["recover"]:

    rule:
        name:
            f"recover_{short_hash(batch)}"
        input:
            PLAN.inputs("recover", *batch),
        output:
            PLAN.outputs("recover", batch),
        log:
            f"logs/recover/{short_hash(batch)}.log",
        conda:
            "../../environment.yml"
        threads: PLAN.threads("recover")
        resources:
            **PLAN.resources("recover"),
        params:
            select=key_options(batch),
            config=PLAN.param("recover", *batch),
        shell:
            job("recover")
