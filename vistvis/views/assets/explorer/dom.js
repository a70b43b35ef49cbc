// Elements from code. Text is text only: nothing that comes from a page's data is parsed as HTML.

/** `element("label", {class: "x", onclick: f}, "text", child)`. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function select(label, options, value, onchange) {
  const list = element("select", { onchange: () => onchange(list.value) });
  for (const [group, entries] of options) {
    const made = entries.map(([name, text]) => element("option", { value: name }, text));
    list.append(...(group ? [element("optgroup", { label: group }, ...made)] : made));
  }
  list.value = value;
  return element("label", {}, element("span", {}, label), list);
}

export function slider(label, [low, high, step], value, oninput) {
  const range = { type: "range", min: low, max: high, step };
  const input = element("input", { ...range, oninput: () => oninput(Number(input.value)) });
  input.value = value;
  return element("label", {}, element("span", {}, label), input);
}

export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

/** A weight for people: three digits that count. */
export function weightText(value) {
  if (Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  return value >= 0.001 ? value.toPrecision(3) : value.toExponential(2);
}

export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
