-- The views `pear-data sql` queries, as made for a store with one shard, the policies initial and behavior
-- and the weighting block. Other policies and weightings add their columns; a missing one leaves them out.
-- Columns that name no weighting are those of block if there is one, else of the first made.

CREATE SCHEMA stored;

CREATE OR REPLACE VIEW stored."corpus" AS
SELECT sample_id, source, label, input_ids, loss_mask, num_tokens, num_scored, record
FROM read_parquet([
    'STORE/corpus/part-00000.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."summary/corpus" AS
SELECT sample_id, source, label, num_tokens, num_scored
FROM read_parquet([
    'STORE/summary/corpus/part-00000.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."vocabulary" AS
SELECT token_id, token
FROM read_parquet([
    'STORE/tokenizer/vocabulary.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."scores/initial" AS
SELECT sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM read_parquet([
    'STORE/scores/initial/part-00000.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."scores/behavior" AS
SELECT sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM read_parquet([
    'STORE/scores/behavior/part-00000.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."weights/block" AS
SELECT sample_id, weights, num_scored, status
FROM read_parquet([
    'STORE/weights/block/part-00000.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."summary/weights/block" AS
SELECT sample_id, num_scored, log_ratio_sum, weight_sum, weight_square_sum, weight_min, weight_max, clipped_low, clipped_high, saturated_low, saturated_high, status
FROM read_parquet([
    'STORE/summary/weights/block/part-00000.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW stored."totals/weights/block" AS
SELECT source, samples, negatives, ok, unscored, dropped, sample_mean_sum, sample_mean_square_sum, sample_ratio_square_sum, log_ratio_min, log_ratio_max, weight_min, weight_max, tokens, clipped_low, clipped_high, saturated_low, saturated_high, weight_sum, weight_square_sum, target_logprob_sum, behavior_logprob_sum, log_ratio_square_sum, log_ratio_bins, log_ratio_counts, weight_bins, weight_counts, sample_weight_bins, sample_weight_counts
FROM read_parquet([
    'STORE/summary/weights/block/part-00000.totals.parquet'
], hive_partitioning = false);

CREATE OR REPLACE VIEW corpus AS
SELECT sample_id, source, label, input_ids, loss_mask, num_tokens, num_scored, record
FROM stored.corpus;

CREATE OR REPLACE VIEW scores AS
SELECT 'initial' AS policy, sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM stored."scores/initial"
UNION ALL
SELECT 'behavior' AS policy, sample_id, logprobs, span_tokens, num_scored, logprob_sum, status
FROM stored."scores/behavior";

CREATE OR REPLACE VIEW weights AS
SELECT
  'block' AS name,
  s.sample_id AS "sample_id",
  w.weights AS "weights",
  s.num_scored AS "num_scored",
  s.log_ratio_sum AS "log_ratio_sum",
  s.weight_sum / nullif(s.num_scored, 0) AS "weight_mean",
  s.weight_min AS "weight_min",
  s.weight_max AS "weight_max",
  CASE WHEN s.weight_square_sum = 0 THEN 0 ELSE s.weight_sum ** 2 / s.weight_square_sum END AS "ess",
  s.clipped_low AS "clipped_low",
  s.clipped_high AS "clipped_high",
  s.saturated_low AS "saturated_low",
  s.saturated_high AS "saturated_high",
  s.weight_sum AS "weight_sum",
  s.weight_square_sum AS "weight_square_sum",
  s.status AS "status"
FROM stored."summary/weights/block" AS s
LEFT JOIN stored."weights/block" AS w ON w.sample_id = s.sample_id;

CREATE OR REPLACE VIEW samples AS
SELECT
  c.sample_id AS "sample_id",
  c.source AS "source",
  c.label AS "label",
  c.num_tokens AS "num_tokens",
  c.num_scored AS "num_scored",
  p0.logprob_sum AS "logprob_sum_initial",
  exp(-p0.logprob_sum / nullif(c.num_scored, 0)) AS "perplexity_initial",
  p0.status AS "status_initial",
  p1.logprob_sum AS "logprob_sum_behavior",
  exp(-p1.logprob_sum / nullif(c.num_scored, 0)) AS "perplexity_behavior",
  p1.status AS "status_behavior",
  w0.log_ratio_sum AS "log_ratio_sum",
  w0.weight_sum / nullif(w0.num_scored, 0) AS "weight_mean",
  w0.weight_min AS "weight_min",
  w0.weight_max AS "weight_max",
  CASE WHEN w0.weight_square_sum = 0 THEN 0 ELSE w0.weight_sum ** 2 / w0.weight_square_sum END AS "ess",
  w0.clipped_low AS "clipped_low",
  w0.clipped_high AS "clipped_high",
  w0.saturated_low AS "saturated_low",
  w0.saturated_high AS "saturated_high",
  w0.weight_sum AS "weight_sum",
  w0.weight_square_sum AS "weight_square_sum",
  w0.status AS "weight_status",
  w0.log_ratio_sum AS "log_ratio_sum_block",
  w0.weight_sum / nullif(w0.num_scored, 0) AS "weight_mean_block",
  w0.weight_min AS "weight_min_block",
  w0.weight_max AS "weight_max_block",
  CASE WHEN w0.weight_square_sum = 0 THEN 0 ELSE w0.weight_sum ** 2 / w0.weight_square_sum END AS "ess_block",
  w0.clipped_low AS "clipped_low_block",
  w0.clipped_high AS "clipped_high_block",
  w0.saturated_low AS "saturated_low_block",
  w0.saturated_high AS "saturated_high_block",
  w0.weight_sum AS "weight_sum_block",
  w0.weight_square_sum AS "weight_square_sum_block",
  w0.status AS "weight_status_block"
FROM stored."summary/corpus" AS c
LEFT JOIN stored."scores/initial" AS p0 ON p0.sample_id = c.sample_id
LEFT JOIN stored."scores/behavior" AS p1 ON p1.sample_id = c.sample_id
LEFT JOIN stored."summary/weights/block" AS w0 ON w0.sample_id = c.sample_id;

CREATE OR REPLACE VIEW tokens AS
SELECT
  s.sample_id AS "sample_id",
  s.source AS "source",
  s.position AS "position",
  s.t AS "t",
  s.token_id AS "token_id",
  (SELECT list(token ORDER BY token_id) FROM stored.vocabulary)[s.token_id + 1] AS "token",
  s."logprob_initial" AS "logprob_initial",
  s."logprob_behavior" AS "logprob_behavior",
  s."logprob_initial"::DOUBLE - s."logprob_behavior"::DOUBLE AS "log_ratio",
  s."weight_block" AS "weight",
  s."weight_block" AS "weight_block"
FROM (
  SELECT
    c.sample_id,
    c.source,
    unnest(range(1, c.num_scored + 1))::INTEGER AS t,
    unnest(list_where(range(k.num_tokens), k.loss_mask))::INTEGER AS "position",
    unnest(list_where(k.input_ids, k.loss_mask)) AS "token_id",
    unnest(p0.logprobs) AS "logprob_initial",
    unnest(p1.logprobs) AS "logprob_behavior",
    unnest(w0.weights) AS "weight_block"
  FROM stored."summary/corpus" AS c
  LEFT JOIN stored."corpus" AS k ON k.sample_id = c.sample_id
  LEFT JOIN stored."scores/initial" AS p0 ON p0.sample_id = c.sample_id
  LEFT JOIN stored."scores/behavior" AS p1 ON p1.sample_id = c.sample_id
  LEFT JOIN stored."weights/block" AS w0 ON w0.sample_id = c.sample_id
) AS s;

CREATE OR REPLACE VIEW histograms AS
SELECT
  name,
  source,
  quantity,
  CASE WHEN bin >= 32768 THEN CASE WHEN (bin - 32768) < 128 THEN ((bin - 32768) & 127) / 128 * 2.0 ** -126 ELSE (1 + ((bin - 32768) & 127) / 128) * 2.0 ** (((bin - 32768) >> 7) - 127) END ELSE -(CASE WHEN (32767 - bin) < 128 THEN (((32767 - bin) & 127) * 65536 + 65535) / 8388608 * 2.0 ** -126 ELSE (1 + (((32767 - bin) & 127) * 65536 + 65535) / 8388608) * 2.0 ** (((32767 - bin) >> 7) - 127) END) END AS value,
  sum(count)::BIGINT AS count
FROM (
  SELECT 'block' AS name, source, 'log_ratio' AS quantity, unnest(log_ratio_bins) AS bin, unnest(log_ratio_counts) AS count
  FROM stored."totals/weights/block"
  UNION ALL
  SELECT 'block' AS name, source, 'weight' AS quantity, unnest(weight_bins) AS bin, unnest(weight_counts) AS count
  FROM stored."totals/weights/block"
  UNION ALL
  SELECT 'block' AS name, source, 'sample_weight' AS quantity, unnest(sample_weight_bins) AS bin, unnest(sample_weight_counts) AS count
  FROM stored."totals/weights/block"
) AS b
GROUP BY name, source, quantity, bin;

CREATE OR REPLACE VIEW deciles AS
SELECT
  name,
  source,
  decile,
  sum(tokens)::BIGINT AS tokens,
  sum(clipped_low)::BIGINT AS clipped_low,
  sum(clipped_high)::BIGINT AS clipped_high,
  sum(saturated_low)::BIGINT AS saturated_low,
  sum(saturated_high)::BIGINT AS saturated_high,
  nullif(sum(weight_sum)::DOUBLE, 'nan') AS weight_sum,
  nullif(sum(weight_square_sum)::DOUBLE, 'nan') AS weight_square_sum,
  nullif(sum(target_logprob_sum)::DOUBLE, 'nan') AS target_logprob_sum,
  nullif(sum(behavior_logprob_sum)::DOUBLE, 'nan') AS behavior_logprob_sum,
  nullif(sum(log_ratio_square_sum)::DOUBLE, 'nan') AS log_ratio_square_sum
FROM (
  SELECT 'block' AS name, source, unnest(range(1, 11))::INTEGER AS decile, unnest(tokens) AS tokens, unnest(clipped_low) AS clipped_low, unnest(clipped_high) AS clipped_high, unnest(saturated_low) AS saturated_low, unnest(saturated_high) AS saturated_high, unnest(weight_sum) AS weight_sum, unnest(weight_square_sum) AS weight_square_sum, unnest(target_logprob_sum) AS target_logprob_sum, unnest(behavior_logprob_sum) AS behavior_logprob_sum, unnest(log_ratio_square_sum) AS log_ratio_square_sum
  FROM stored."totals/weights/block"
) AS d
GROUP BY name, source, decile;
