// Elements without markup: every text becomes a text node, so nothing that a model writes can become an element.

const PROPERTIES = new Set(["value", "checked", "disabled", "open", "hidden", "selected", "indeterminate", "files", "multiple"]);

/** An element with attributes, listeners (`onclick`) and children (texts or nodes; null is left out). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false) element.setAttribute(name, String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) append(element, child);
    else if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** Put these children in place of the old ones. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** Set a text only where it changes: a screen reader hears nothing twice, and the page is not laid out anew. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A width in per cent of the parent. */
export function width(element, share) {
  const value = `${Math.max(0, Math.min(100, share * 100)).toFixed(2)}%`;
  if (element.style.width !== value) element.style.width = value;
}

/** Hand a text to the user as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
