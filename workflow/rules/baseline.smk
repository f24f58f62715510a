# The clean model, and hooks ablated, on held-out tokens: what evaluations are compared with. A job measures several hooks.
for batch in PLAN.batches["baseline"]:

    rule:
        name:
            f"baseline_{short_hash(batch)}"
        input:
            PLAN.inputs("baseline", *batch),
        output:
            PLAN.outputs("baseline", batch),
        log:
            f"logs/baseline/{short_hash(batch)}.log",
        conda:
            "../../environment.yml"
        threads: PLAN.threads("baseline")
        resources:
            **PLAN.resources("baseline"),
        params:
            select=key_options(batch),
            config=PLAN.param("baseline", *batch),
        shell:
            job("baseline")
