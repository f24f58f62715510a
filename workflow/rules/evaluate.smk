# A job evaluates several dictionaries of one model on the same tokens, sharing the clean pass.
for batch in PLAN.batches["evaluate"]:

    rule:
        name:
            f"evaluate_{short_hash(batch)}"
        input:
            PLAN.inputs("evaluate", *batch),
        output:
            PLAN.outputs("evaluate", batch),
        log:
            f"logs/evaluate/{short_hash(batch)}.log",
        conda:
            "../../environment.yml"
        threads: PLAN.threads("evaluate")
        resources:
            **PLAN.resources("evaluate"),
        params:
            select=key_options(batch),
            config=PLAN.param("evaluate", *batch),
        shell:
            job("evaluate")
