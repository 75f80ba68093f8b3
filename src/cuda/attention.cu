// Attention over a tree of keys, forward and backward; the twin of ops/attention.rs. Grouped queries, soft-cap (0 = none) and
// sliding window (0 = none).
//
// Keys and values lie in stores [key rows, key_heads * dim] of bf16. A span is consecutive query rows of one sequence and the key
// rows of its context, prefix before own, as ops::attention::Span has them: query i sees the first context - query_len + i + 1
// logical positions, or the last `window` of these. Prefix and own rows are walked in tiles of so many keys from their first on, in
// order, so a query's result is the same bits whatever else is computed. One block computes one query head of up to 64 queries of a
// span, or one key head of 64 keys; products are those of tensor cores (bf16 in, sums in f32), and what goes into them is rounded:
// scaled queries, weights, the gradients of outputs and scores.
//
// dim is even, at most 256, head groups (query_heads / key_heads) are any size. Kernels with a number in their name are for
// dim <= that: take the smallest that fits (64, 128, 256; D below). They take dynamic shared memory of so many bytes as the host
// must allow first (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES):
//   forward            2 * (D + 8) * 128                         keys: 32 a tile
//   backward_queries   2 * (D + 8) * 192                         keys: 32 a tile
//   backward_keys      2 * (D + 8) * 192 + 2 * 64 * 40 * 2 + 256     queries: 32 a tile
//
// struct Span { int query_start, query_len, prefix_start, prefix_len, own_start, own_len; }
// struct Tile { int span, first; }   for queries: `first` counts from the span's query_start; for keys: from its own_start.
//                                    Multiples of 64. Longest spans first keep all multiprocessors busy to the end.
//
//   store_keys(keys, values, to_row, key_store, value_store, rows, width)                           (rows; 256)
//       Rounds rows of a call [rows, width] into rows to_row[i] of the stores; width = key_heads * dim.
//   attention_rows(queries, key_store, value_store, row_span, spans, out_or_null, out_rounded_or_null, log_sums_or_null, rows,
//                  query_heads, key_heads, dim, scale, soft_cap, window)             (rows, key_heads, ceil(group / 8); 256)
//       For decoding: one query row at a time, walking its keys as fast as memory gives them. row_span[i] is the span of row i; -1
//       leaves the row alone. It needs no tiles, so it computes any call; on long spans it is slow.
//   attention_forward_{64,128,256}(queries, key_store, value_store, tiles, spans, out_or_null, out_rounded_or_null,
//                  log_sums_or_null, query_heads, key_heads, dim, scale, soft_cap, window)          (tiles, query_heads; 128)
//       out [rows, query_heads * dim] in f32 and rounded, log_sums [rows, query_heads].
//   attention_pull(grad, out, pulls, rows, query_heads, dim)                                        (rows, query_heads; 32)
//       pulls [rows, query_heads]: the dot products of outputs and their gradients, which both backward kernels need.
//   attention_backward_queries_{64,128,256}(queries, key_store, value_store, grad, log_sums, pulls, tiles, spans, d_queries,
//                  query_heads, key_heads, dim, scale, soft_cap, window)                            (tiles, query_heads; 128)
//       d_queries [rows, query_heads * dim], written.
//   attention_backward_keys_{64,128,256}(queries, key_store, value_store, grad, log_sums, pulls, tiles, spans, reader_start,
//                  readers, d_keys, d_values, query_heads, key_heads, dim, scale, soft_cap, window) (key tiles, key_heads; 256)
//       d_keys, d_values [rows of the call, key_heads * dim], written. Whole trees only: own_len == query_len for every span, so
//       that key row own_start + i is the call's row query_start + i. readers[reader_start[s]..reader_start[s + 1]] are the spans
//       that see the own keys of span s: itself, and those whose prefix they are. They are summed up in this order.
