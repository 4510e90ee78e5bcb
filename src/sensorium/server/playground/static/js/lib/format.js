// Numbers and times as people read them.

/** Return seconds as text, with as many digits as they deserve: 0.8 ms, 42 ms, 1.30 s, 2 min 5 s. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value < 0.00995) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Return a moment of a recording: 0:07, 1:02:03. */
export function clock(value) {
  const whole = Math.max(0, Math.floor(value));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** Return bytes as text: 512 B, 1.4 MB. */
export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (value >= 999.5 && index < units.length - 1) {
    value /= 1000;
    index += 1;
  }
  return `${index && value < 99.5 ? value.toFixed(1) : Math.round(value)} ${units[index]}`;
}

/** Return a count with separators: 12 345. */
export function count(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

/** Return a number with three significant digits at most. */
export function number(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) >= 99.95) return count(value);
  return Math.abs(value) >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

export function percent(fraction) {
  if (!Number.isFinite(fraction)) return "–";
  return `${(100 * fraction).toFixed(fraction && fraction < 0.0995 ? 1 : 0)} %`;
}

/** Return "1 image", "2 images". */
export function counted(num, noun) {
  return `${count(num)} ${noun}${num === 1 ? "" : "s"}`;
}

/** Return how long ago a moment in milliseconds was, in a word or two. */
export function ago(moment, now = Date.now()) {
  const minutes = Math.round((now - moment) / 60000);
  if (minutes < 1) return "now";
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 1440) return `${Math.round(minutes / 60)} h`;
  return `${Math.round(minutes / 1440)} d`;
}
