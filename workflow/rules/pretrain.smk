# Rebuilds the language model of resources/model, which is shipped; nothing else needs this.
rule pretrain:
    input:
        corpus=f"{BASE}/resources/corpus.jsonl.gz",
    output:
        "results/pretrain/model/README.md",
    log:
        "logs/pretrain.log",
    conda:
        "../../environment.yml"
    threads: 2
    shell:
        f"{RUN}/pretrain.py --corpus {{input.corpus:q}} --out results/pretrain/model"
        " --threads {threads} --log {log:q}"
