-- The views `pear-data sql` queries, as made for a store with one shard, the policies initial and behavior
-- and the weighting block. Other policies and weightings add their columns; a missing one leaves them out.
-- Columns that name no weighting are those of block if there is one, else of the first made.

CREATE SCHEMA stored;

CREATE VIEW stored."corpus" AS
SELECT sample_id, source, label, input_ids, loss_mask, num_tokens, num_scored, record
FROM read_parquet([
    'STORE/corpus/part-00000.parquet'
], hive_partitioning = false);

CREATE VIEW stored."vocabulary" AS
SELECT token_id, token
FROM read_parquet([
    'STORE/tokenizer/vocabulary.parquet'
], hive_partitioning = false);

CREATE VIEW stored."scores/initial" AS
SELECT sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM read_parquet([
    'STORE/scores/initial/part-00000.parquet'
], hive_partitioning = false);

CREATE VIEW stored."scores/behavior" AS
SELECT sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM read_parquet([
    'STORE/scores/behavior/part-00000.parquet'
], hive_partitioning = false);

CREATE VIEW stored."weights/block" AS
SELECT sample_id, weights, num_scored, log_ratio_sum, weight_mean, weight_min, weight_max, ess, clipped_low, clipped_high, status
FROM read_parquet([
    'STORE/weights/block/part-00000.parquet'
], hive_partitioning = false);

CREATE VIEW corpus AS
SELECT sample_id, source, label, input_ids, loss_mask, num_tokens, num_scored, record
FROM stored.corpus;

CREATE VIEW scores AS
SELECT 'initial' AS policy, sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM stored."scores/initial"
UNION ALL
SELECT 'behavior' AS policy, sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM stored."scores/behavior";

CREATE VIEW weights AS
SELECT 'block' AS name, sample_id, weights, num_scored, log_ratio_sum, weight_mean, weight_min, weight_max, ess, clipped_low, clipped_high, status
FROM stored."weights/block";

CREATE VIEW samples AS
SELECT
  c.sample_id,
  c.source,
  c.label,
  c.num_tokens,
  c.num_scored,
  p0.logprob_sum AS "logprob_sum_initial",
  exp(-p0.logprob_sum / nullif(c.num_scored, 0)) AS "perplexity_initial",
  p0.status AS "status_initial",
  p1.logprob_sum AS "logprob_sum_behavior",
  exp(-p1.logprob_sum / nullif(c.num_scored, 0)) AS "perplexity_behavior",
  p1.status AS "status_behavior",
  w0.log_ratio_sum AS log_ratio_sum,
  w0.weight_mean AS weight_mean,
  w0.weight_min AS weight_min,
  w0.weight_max AS weight_max,
  w0.ess AS ess,
  w0.clipped_low AS clipped_low,
  w0.clipped_high AS clipped_high,
  w0.status AS weight_status,
  w0.log_ratio_sum AS "log_ratio_sum_block",
  w0.weight_mean AS "weight_mean_block",
  w0.weight_min AS "weight_min_block",
  w0.weight_max AS "weight_max_block",
  w0.ess AS "ess_block",
  w0.clipped_low AS "clipped_low_block",
  w0.clipped_high AS "clipped_high_block",
  w0.status AS "weight_status_block"
FROM stored.corpus AS c
LEFT JOIN stored."scores/initial" AS p0 ON p0.sample_id = c.sample_id
LEFT JOIN stored."scores/behavior" AS p1 ON p1.sample_id = c.sample_id
LEFT JOIN stored."weights/block" AS w0 ON w0.sample_id = c.sample_id;

CREATE VIEW tokens AS
SELECT
  s.sample_id,
  s.source,
  s.position,
  s.t,
  s.token_id,
  v.token,
  s."logprob_initial",
  s."logprob_behavior",
  s."logprob_initial"::DOUBLE - s."logprob_behavior"::DOUBLE AS log_ratio,
  s."weight_block" AS weight,
  s."weight_block"
FROM (
  SELECT
    c.sample_id,
    c.source,
    unnest(list_where(range(c.num_tokens), c.loss_mask))::INTEGER AS position,
    unnest(range(1, c.num_scored + 1))::INTEGER AS t,
    unnest(list_where(c.input_ids, c.loss_mask)) AS token_id,
    unnest(p0.logprobs) AS "logprob_initial",
    unnest(p1.logprobs) AS "logprob_behavior",
    unnest(w0.weights) AS "weight_block"
  FROM stored.corpus AS c
  LEFT JOIN stored."scores/initial" AS p0 ON p0.sample_id = c.sample_id
  LEFT JOIN stored."scores/behavior" AS p1 ON p1.sample_id = c.sample_id
  LEFT JOIN stored."weights/block" AS w0 ON w0.sample_id = c.sample_id
) AS s
LEFT JOIN stored.vocabulary AS v ON v.token_id = s.token_id;
