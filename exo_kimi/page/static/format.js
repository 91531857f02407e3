// Numbers as the command line prints them: GiB is 2^30 bytes.

/** `8.94 GiB` */
export function bytes(count) {
  let size = count;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(size) >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return unit === 0 ? `${count} B` : `${size.toFixed(2)} ${units[unit]}`;
}

/** `12 ms`, `3.4 s`, `5 min 20 s` */
export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
}

/** `163,840` */
export function count(value) {
  return Math.round(value).toLocaleString("en-US");
}

/** `19.1 tokens/s` */
export function speed(value) {
  return `${value >= 100 ? value.toFixed(0) : value.toFixed(1)} tokens/s`;
}
