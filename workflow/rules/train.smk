# A job trains several dictionaries that read the same batches (training.together); each has its own folder and key.
for batch in PLAN.batches["train"]:

    rule:
        name:
            f"train_{short_hash(batch)}"
        input:
            PLAN.inputs("train", *batch),
        output:
            PLAN.outputs("train", batch),
        log:
            f"logs/train/{short_hash(batch)}.log",
        conda:
            "../../environment.yml"
        threads: PLAN.threads("train")
        resources:
            **PLAN.resources("train"),
        params:
            select=key_options(batch),
            config=PLAN.param("train", *batch),
        shell:
            job("train")
